"""Sparse-linear attention (SLA, arXiv 2509.24006) as a module."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from . import block_map
from .fallback import EPSILON, features
from .ops import classes_of, sla_op
from .options import RASTER, AttentionOptions
from .token_order import Grid, inverse, tile_order


class SparseLinearAttention(nn.Module):
    """Stands in for the module of the same name in thu-ml/SLA: arguments, parameters and results agree.

    The released defaults compute in bfloat16 (`use_bf16=False`: float16) over a linear branch that sees every key
    (branch `main`).  Beyond them: `scope` and `negligible` (the paper's, and branch SLA-1's), `tile` for tokens in
    boxes, and `dtype = None`, which computes in the type of the inputs, or autocast's.
    """

    def __init__(self, head_dim: int, topk: float, feature_map: str = "softmax", BLKQ: int = 64, BLKK: int = 64,
                 use_bf16: bool = True, tie_feature_map_qk: bool = True, *, scope: str = "all",
                 negligible: float = 0.0, tile: Grid = RASTER):
        super().__init__()
        if not tie_feature_map_qk:
            raise NotImplementedError("queries and keys share one feature map, as in every released model")
        self.options = AttentionOptions("sla", topk, negligible, scope, feature_map, BLKQ, BLKK, tile=tuple(tile))
        self.dtype: torch.dtype | None = torch.bfloat16 if use_bf16 else torch.float16
        self.proj_l = nn.Linear(head_dim, head_dim, dtype=torch.float32)
        self.init_weights_()

    @classmethod
    def of(cls, head_dim: int, options: AttentionOptions) -> SparseLinearAttention:
        """In the type of its inputs, on tokens that stand in the adapter's order already."""
        module = cls(head_dim, options.topk, options.feature_map, options.block_q, options.block_k,
                     scope=options.scope, negligible=options.negligible)
        module.dtype = None
        return module

    def init_weights_(self) -> None:
        """Zeros, so that training starts at pure sparse attention; at the linear branch itself when it is alone."""
        with torch.no_grad():
            nn.init.zeros_(self.proj_l.weight) if self.options.topk else nn.init.eye_(self.proj_l.weight)
            nn.init.zeros_(self.proj_l.bias)

    @property
    def topk(self) -> float:
        return self.options.topk

    @topk.setter
    def topk(self, value: float) -> None:
        self.options = replace(self.options, topk=value)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, return_sparsity: bool = False, *, grid: Grid | None = None,
                classes: Tensor | None = None) -> Tensor | tuple[Tensor, float]:
        """q, k, v [B, H, L, D] after rotation -> the same shape; with return_sparsity also the share of key
        blocks that are kept.  `grid` is needed for tiles; `classes` u8 [B, H, Nq, Nk] replaces the own map."""
        order = None
        if self.options.tile != RASTER:
            if grid is None:
                raise ValueError("tokens in tiles need the token grid")
            order = tile_order(tuple(grid), self.options.tile).to(q.device)
            q, k, v = (x[..., order, :] for x in (q, k, v))
        out = self._attend(q, k, v, classes)
        if order is not None:
            out = out[..., inverse(order), :]
        if not return_sparsity:
            return out
        key_blocks = block_map.blocks(k.shape[-2], self.options.block_k)
        return out, self.options.critical(key_blocks) / key_blocks

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, classes: Tensor | None) -> Tensor:
        options, kind = self.options, q.device.type
        given, dtype = q.dtype, self.dtype
        if dtype is None:
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        if not options.topk and classes is None:
            return linear_only(*(x.to(dtype) for x in (q, k, v)), self.proj_l, options.feature_map).to(given)
        # The operators' order of dimensions, copied here once or not at all.
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        if classes is None:
            classes = classes_of(q, k, options)
        out, _ = sla_op(*(x.to(dtype) for x in (q, k, v)), classes, self.proj_l.weight, self.proj_l.bias,
                        options.scope, options.feature_map, options.block_q, options.block_k)
        return out.transpose(1, 2).to(given)


def linear_only(q: Tensor, k: Tensor, v: Tensor, proj: nn.Linear, feature_map: str) -> Tensor:
    """The linear branch over every key, by itself: the yardstick that SLA is held against.  [B, H, L, D]."""
    with torch.autocast(q.device.type, enabled=False):
        phi_q, phi_k, v = features(q.float(), feature_map), features(k.float(), feature_map), v.float()
        out = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2, keepdim=True).mT + EPSILON)
        return proj(out)
