"""slalomd's noise (kernels/core/random.h): element i of a stream follows from (seed, stream, i) alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def _philox(seed: int, stream: int, counters: np.ndarray) -> np.ndarray:
    """Philox 4x32-10: uint32 [n, 4]."""
    words = [counters & _LOW, counters >> np.uint64(32), np.full_like(counters, stream & 0xFFFFFFFF),
             np.full_like(counters, stream >> 32)]
    key = [np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)]
    with np.errstate(over="ignore"):
        for _ in range(10):
            products = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
            words = [(products[1] >> np.uint64(32)) ^ words[1] ^ np.uint64(key[0]), products[1] & _LOW,
                     (products[0] >> np.uint64(32)) ^ words[3] ^ np.uint64(key[1]), products[0] & _LOW]
            key = [k + w for k, w in zip(key, _WEYL)]
    return np.stack(words, -1)


def normal(seed: int, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """N(0, 1), float32."""
    count = int(np.prod(shape))
    words = _philox(seed, stream, np.arange(-(-count // 2), dtype=np.uint64))
    bits = (words[:, 0::2] | words[:, 1::2] << np.uint64(32)).reshape(-1)[:count]
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return torch.special.ndtri(torch.from_numpy(uniform)).float().view(shape)
