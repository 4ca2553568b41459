"""Which block pairs attend: classes u8 [B, H, Nq, Nk], as kernels/attention.h defines them.

The maps carry no gradient.  Scores are pooled in float32, and equal ones go to the lower index, so that
these maps are those of slalomd wherever scores differ by more than rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import AttentionOptions, critical_blocks, negligible_blocks

NEGLIGIBLE, CRITICAL, MARGINAL = 0, 1, 2


def blocks(length: int, block: int) -> int:
    return (length + block - 1) // block


def pooled(x: Tensor, block: int) -> Tensor:
    """Means over the rows that are really in a block: [.., L, D] -> [.., N, D] float32."""
    length = x.shape[-2]
    count = blocks(length, block)
    padded = F.pad(x, (0, 0, 0, count * block - length)).unflatten(-2, (count, block))
    rows = torch.full((count, 1), float(block), device=x.device)
    rows[-1] = length - (count - 1) * block
    return padded.sum(-2, dtype=torch.float32) / rows


@torch.no_grad()
def topk_map(q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor:
    """q, k [B, H, L, D] after rotation; the largest pooled scores of each query block are critical."""
    with torch.autocast(q.device.type, enabled=False):
        scores = pooled(q, options.block_q) @ pooled(k, options.block_k).mT
    key_blocks = scores.shape[-1]
    critical = critical_blocks(options.topk, key_blocks)
    negligible = negligible_blocks(options.negligible, key_blocks, critical)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    row = torch.full((key_blocks,), MARGINAL, dtype=torch.uint8, device=q.device)
    row[:critical] = CRITICAL
    row[key_blocks - negligible:] = NEGLIGIBLE
    return torch.empty_like(scores, dtype=torch.uint8).scatter_(-1, order, row.expand_as(order).contiguous())


def window_map(batch: int, heads: int, length: int, options: AttentionOptions, device: torch.device) -> Tensor:
    """As many neighbouring key blocks as topk would keep, around each query block's middle row."""
    rows, columns = blocks(length, options.block_q), blocks(length, options.block_k)
    count = critical_blocks(options.topk, columns)
    begin = torch.arange(rows, device=device) * options.block_q
    middle = begin + ((length - begin).clamp(max=options.block_q) - 1) // 2
    first = (middle // options.block_k - (count - 1) // 2).clamp(0, columns - count)
    column = torch.arange(columns, device=device)
    inside = (column >= first[:, None]) & (column < first[:, None] + count)
    return torch.where(inside, CRITICAL, MARGINAL).to(torch.uint8).expand(batch, heads, -1, -1)


def critical_lists(classes: Tensor) -> Tensor:
    """int64 [B, H, Nq, M]: the critical key blocks of each row in ascending order; -1 where a row has fewer."""
    critical = classes == CRITICAL
    most = int(critical.sum(-1).max())
    index = critical.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :most]
    return torch.where(critical.gather(-1, index), index, -1)


def sparsity(classes: Tensor) -> Tensor:
    """Share of block pairs outside the softmax."""
    return 1 - (classes == CRITICAL).float().mean()
