"""The order in which tokens stand: raster, or boxes of tokens that are near in space and time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # frames, rows, columns of tokens


@functools.lru_cache(maxsize=64)
def tile_order(grid: Grid, tile: Grid) -> Tensor:
    """int64 [L]: the raster index of each token in the new order.

    Boxes stand in raster order and so do the tokens inside a box; boxes at the far ends are smaller when
    the grid is not a multiple of the tile.
    """
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    key = torch.zeros(grid, dtype=torch.int64)
    for position, size, count in zip((t, y, x), tile, grid):
        key = key * -(-count // size) + position // size
    for position, size in zip((t, y, x), tile):
        key = key * size + position % size
    return key.flatten().argsort()


def inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def time_last(grid: Grid) -> Tensor:
    """int64 [L]: the order (y, x, t), in which neighbours in time are neighbours in the sequence."""
    return torch.arange(grid[0] * grid[1] * grid[2]).reshape(grid).permute(1, 2, 0).flatten()
