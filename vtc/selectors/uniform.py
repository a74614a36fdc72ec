"""Uniform selection: a grid-aware stride, the second baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import largest_remainder
from ..context import Grid, VisualContext
from ..registry import register_selector
from ..selection import Selection
from .base import Selector

__all__ = ["UniformSelector"]

_GOLDEN = (math.sqrt(5) - 1) / 2


@register_selector
@dataclass(frozen=True)
class UniformSelector(Selector):
    """Keep K tokens spread evenly over time, rows and columns.

    The rule, for one view (t, h, w): K tokens are dealt evenly to the t frames, those of a frame evenly to its h rows,
    those of a row evenly to its w columns. Dealing m tokens evenly to n places puts token j at place ``floor((j +
    phase) * n / m)``, so places differ by at most one token, and tokens by at most one place from an exact stride. The
    phase starts at the centre (1/2) and advances by the golden ratio from one frame or row to the next: a stride that
    began at the same column everywhere would see only a few columns of the picture, a constant shift would draw
    diagonals.

    Several views (tiles) share K by the method of largest remainders. Deterministic; exact for every K.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline; strided sampling of the token grid"
    reads_features: ClassVar[bool] = False

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        sizes = [math.prod(grid) for grid in ctx.grids]
        shares = largest_remainder(min(ctx.budget, ctx.n), sizes)
        kept, start = [], 0
        for view, (grid, size, share) in enumerate(zip(ctx.grids, sizes, shares, strict=True)):
            kept.append(start + _deal(share, grid, view))
            start += size
        return Selection(ctx.n, torch.cat(kept).to(ctx.features.device))


def _deal(k: int, grid: Grid, view: int) -> Tensor:
    """(k,) long, ascending: raster indices of `k` tokens spread over `grid`; `view` shifts the first phase."""
    index = torch.zeros(k, dtype=torch.long)  # index of the place reached so far: nothing, frame, row, token
    for size in grid:
        _, place, count = index.unique_consecutive(return_inverse=True, return_counts=True)
        order = torch.arange(k) - (count.cumsum(0) - count)[place]  # j, within its place
        phase = (0.5 + _GOLDEN * (view + torch.arange(count.numel(), dtype=torch.float64))) % 1
        index = index * size + ((order + phase[place]) * size / count[place]).long()
    return index
