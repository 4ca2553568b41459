"""SALAD (arXiv 2601.16515) as a module: sparse attention plus a gated linear branch on the same projections.

Where the paper leaves room this is slalom's reading: the ReLU stands before the rotation, the linear branch's
denominator is not rotated, the gate of a sample is the mean of its tokens' gates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fallback import EPSILON
from .library import has_library
from .ops import classes_of, salad_op, sla_op
from .options import RASTER, AttentionOptions
from .rope import Rope, rotate
from .token_order import Grid, inverse, tile_order, time_last


class SaladAttention(nn.Module):
    """What stands between a layer's q, k, v projections and its o projection."""

    def __init__(self, heads: int, head_dim: int, topk: float = 0.1, block_q: int = 64, block_k: int = 64,
                 map: str = "topk", gate: str = "token", linear_branch: bool = True, *, tile: Grid = RASTER):
        super().__init__()
        self.options = AttentionOptions("salad", topk, 0.0, block_q=block_q, block_k=block_k, map=map, gate=gate,
                                        tile=tuple(tile))
        self.heads, self.dtype = heads, None
        dim = heads * head_dim
        self.proj = nn.Linear(dim, dim) if linear_branch else None
        self.gate = nn.Linear(dim, 1) if linear_branch else None
        if linear_branch:
            for parameter in self.parameters():
                nn.init.zeros_(parameter)  # training starts at pure sparse attention, the gate half open

    @classmethod
    def of(cls, heads: int, head_dim: int, options: AttentionOptions, layer: int) -> SaladAttention:
        """For tokens that stand in the adapter's order already."""
        return cls(heads, head_dim, options.topk, options.block_q, options.block_k, options.map, options.gate,
                   layer not in options.dropped_layers)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope, grid: Grid,
                classes: Tensor | None = None) -> Tensor:
        """x [B, L, d] the layer's input; q, k (after RMSNorm, before rotation), v [B, L, H, D]; rope and grid of
        the tokens.  -> [B, L, d].  `classes` u8 [B, H, Nq, Nk] replaces the own map."""
        if self.options.tile == RASTER:
            return self._attend(x, q, k, v, rope, grid, classes)
        order = tile_order(tuple(grid), self.options.tile).to(x.device)
        x, q, k, v = (t[:, order] for t in (x, q, k, v))
        rope = (rope[0][order], rope[1][order])
        return self._attend(x, q, k, v, rope, grid, classes)[:, inverse(order)]

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope, grid: Grid,
                classes: Tensor | None) -> Tensor:
        kind, given = x.device.type, x.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        x, q, k, v = (t.to(dtype) for t in (x, q, k, v))
        rotated = rotate(q, rope), rotate(k, rope)
        if classes is None:
            classes = classes_of(*rotated, self.options)
        with torch.autocast(kind, enabled=False):
            if self.proj is not None and has_library(dtype, x.device):
                out, _ = salad_op(*rotated, v, q, k, *rope, x, classes, self.proj.weight.to(dtype), self.proj.bias,
                                  self.gate.weight, self.gate.bias, list(grid), self.options.map, self.options.gate,
                                  self.options.block_q, self.options.block_k)
            else:
                out = self._sparse(*rotated, v, classes, grid)
                if self.proj is not None:
                    out = out + self._gated_linear(x, q, k, v, rope).to(dtype)
        return out.to(given)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, classes: Tensor, grid: Grid) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, classes: Tensor) -> Tensor:
            return sla_op(q, k, v, classes, None, None, "all", "relu", self.options.block_q, self.options.block_k)[0]

        if self.options.map == "topk":
            return attend(q, k, v, classes).flatten(2)
        half = self.heads // 2  # the other heads order their tokens (y, x, t)
        order = time_last(grid).to(q.device)
        late = attend(*(t[:, order, half:] for t in (q, k, v)), classes[:, half:])[:, inverse(order)]
        if not half:
            return late.flatten(2)
        return torch.cat([attend(*(t[:, :, :half] for t in (q, k, v)), classes[:, :half]), late], 2).flatten(2)

    def _gated_linear(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        x, q, k, v = (t if t.dtype == torch.float64 else t.float() for t in (x, q, k, v))
        q, k = torch.relu(q), torch.relu(k)
        state = torch.einsum("blhd,blhe->bhde", rotate(k, rope), v)
        linear = torch.einsum("blhd,bhde->blhe", rotate(q, rope), state)
        linear = linear / ((q * k.sum(1, keepdim=True)).sum(-1, keepdim=True) + EPSILON)
        gate = torch.sigmoid(self.gate(x))
        if self.options.gate == "sample":
            gate = gate.mean(1, keepdim=True)
        return gate * self.proj(linear.flatten(2))
