"""Chooses how each convolution of the VAE is computed: in 3-D, or in 2-D over frames with their past.

The values are the same (see CausalConv3d); which is faster depends on device and sizes, so it is measured.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from vae import CausalConv3d, WanVae


def _shapes(vae: WanVae, clip: Tensor) -> dict[CausalConv3d, torch.Size]:
    """The input shape of every convolution that has a past."""
    shapes: dict[CausalConv3d, torch.Size] = {}
    hooks = [m.register_forward_pre_hook(lambda module, inputs: shapes.__setitem__(module, inputs[0].shape))
             for m in vae.modules() if isinstance(m, CausalConv3d) and m.kernel_size[0] > 1]
    with torch.no_grad():
        vae.decode(vae.encode(clip)[0])
    for hook in hooks:
        hook.remove()
    return shapes


def _seconds(conv: CausalConv3d, x: Tensor, backward: bool, rounds: int = 5) -> float:
    """Time of one pass; the first two are apart, since they choose algorithms."""
    begin = 0.0
    for i in range(rounds + 2):
        if i == 2:
            torch.cuda.synchronize(x.device)
            begin = time.perf_counter()
        y = conv(x)
        if backward:
            y.sum().backward()
    torch.cuda.synchronize(x.device)
    return (time.perf_counter() - begin) / rounds


def choose_forms(vae: WanVae, clip: Tensor, backward: bool = True) -> str:
    """Sets `planar` of every convolution by measurement on the GPU for clips like this one; says what came out."""
    measured: dict[tuple, bool] = {}
    solid, planar, best = 0.0, 0.0, 0.0
    with torch.autocast(clip.device.type, torch.bfloat16), torch.set_grad_enabled(backward):
        shapes = _shapes(vae, clip)
        for conv, shape in shapes.items():
            key = (conv.out_channels, conv.kernel_size, shape)
            if key not in measured:
                x = torch.randn(shape, device=clip.device, dtype=torch.bfloat16)
                x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_(backward)
                times = {}
                for conv.planar in (False, True):
                    times[conv.planar] = _seconds(conv, x, backward)
                measured[key] = times[True] < times[False]
                solid, planar, best = solid + times[False], planar + times[True], best + min(times.values())
            conv.planar = measured[key]
    vae.zero_grad(set_to_none=True)
    count = sum(conv.planar for conv in shapes)
    return (f"{count} of {len(shapes)} convolutions in 2-D: {1e3 * best:.1f} ms where all in 3-D take "
            f"{1e3 * solid:.1f} and all in 2-D {1e3 * planar:.1f} (each shape once)")
