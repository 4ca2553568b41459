"""Rotary position embedding over frames, rows and columns (Wan's 3D form)."""

from __future__ import annotations

import torch
from torch import Tensor

from .token_order import Grid

Rope = tuple[Tensor, Tensor]  # cos and sin, each [L, head_dim / 2] float32


def rope_table(grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> Rope:
    """Pairs of channels share an angle; the first pairs turn with t, then y, then x."""
    spatial = 2 * (head_dim // 6)
    parts = []
    for axis, (size, width) in enumerate(zip(grid, (head_dim - 2 * spatial, spatial, spatial))):
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(size, dtype=torch.float64), frequencies)
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        parts.append(angles.view(shape).expand(*grid, width // 2))
    table = torch.cat(parts, -1).flatten(0, 2)
    return table.cos().float().to(device), table.sin().float().to(device)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, L, H, D], interleaved pairs (2p, 2p + 1); computed in float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (table[:, None].to(wide.dtype) for table in rope)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
