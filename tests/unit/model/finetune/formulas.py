"""SLA and SALAD as masks over all pairs of tokens, differentiable, in the type of their inputs (float64 in tests)."""

from __future__ import annotations

import torch
from torch import Tensor

CRITICAL, MARGINAL = 1, 2


def spread(classes: Tensor, block_q: int, block_k: int, length: int) -> Tensor:
    """Classes of block pairs [.., Nq, Nk] -> of token pairs [.., L, L]."""
    rows = classes.repeat_interleave(block_q, -2)[..., :length, :]
    return rows.repeat_interleave(block_k, -1)[..., :length]


def features(x: Tensor, kind: str) -> Tensor:
    return {"softmax": lambda: torch.softmax(x, -1), "relu": lambda: torch.relu(x),
            "elu": lambda: torch.nn.functional.elu(x) + 1}[kind]()


def sparse(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(pairs != CRITICAL, -torch.inf)
    return torch.softmax(scores, -1) @ v


def sla(q: Tensor, k: Tensor, v: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, scope: str, feature_map: str,
        block_q: int, block_k: int) -> Tensor:
    """[B, H, L, D]"""
    pairs = spread(classes, block_q, block_k, q.shape[-2])
    inside = {"all": pairs >= 0, "noncritical": pairs != CRITICAL, "marginal": pairs == MARGINAL}[scope]
    products = features(q, feature_map) @ features(k, feature_map).mT * inside
    linear = products @ v / (products.sum(-1, keepdim=True) + 1e-5)
    return sparse(q, k, v, pairs) + linear @ weight.T + bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, D], cos and sin [L, D / 2]"""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def salad(x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], classes: Tensor, proj: tuple,
          gate: tuple, block: int) -> Tensor:
    """q, k, v [B, L, H, D], proj and gate (weight, bias) -> [B, L, d]; raster order, a gate per token."""
    turned = [t.transpose(1, 2) for t in (rotate(q, *rope), rotate(k, *rope), v)]
    out = sparse(*turned, spread(classes, block, block, q.shape[1])).transpose(1, 2).flatten(2)
    qh, kh = torch.relu(q), torch.relu(k)
    weights = rotate(qh, *rope).transpose(1, 2) @ rotate(kh, *rope).transpose(1, 2).mT
    linear = (weights @ turned[2]).transpose(1, 2) / ((qh * kh.sum(1, keepdim=True)).sum(-1) + 1e-5)[..., None]
    opened = torch.sigmoid(x @ gate[0].T + gate[1])
    return out + opened * (linear.flatten(2) @ proj[0].T + proj[1])


def random_classes(generator: torch.Generator, shape: tuple[int, ...], critical: int, negligible: int) -> Tensor:
    """u8 `shape` with the same count of each class in every row, in random places."""
    order = torch.rand(shape, generator=generator).argsort(-1)
    return torch.where(order < critical, 1, torch.where(order < critical + negligible, 0, 2)).to(torch.uint8)
