"""Grids: how the tokens of an image or a video lie in time, rows and columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Grid", "count_tokens", "evenly_spread", "grid_coords"]

Grid = tuple[int, int, int]
"""One view as (t, rows, columns) of language-model tokens, in raster order."""


def count_tokens(grids: tuple[Grid, ...]) -> int:
    """Tokens of all views together."""
    return sum(math.prod(grid) for grid in grids)


def grid_coords(grids: tuple[Grid, ...], device: torch.device | str | None = None) -> Tensor:
    """(N, 4) long: (view, t, row, column) of every token of these views, in their order."""
    parts = []
    for view, (t, h, w) in enumerate(grids):
        thw = torch.cartesian_prod(*(torch.arange(size, device=device) for size in (t, h, w)))
        parts.append(torch.cat([thw.new_full((thw.shape[0], 1), view), thw], dim=1))
    return torch.cat(parts)


def evenly_spread(grid: Grid, smaller: Grid) -> Tensor:
    """(K,) long: raster indices of places in `grid` that are spread evenly, `smaller` of them along each axis."""
    axes = [
        torch.tensor([(2 * i + 1) * size // (2 * few) for i in range(few)])
        for size, few in zip(grid, smaller, strict=True)
    ]
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    return ((t * grid[1] + h) * grid[2] + w).flatten()
