"""Average pooling: cells of the token grid become their means, the third baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import largest_remainder
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.grids import Grid
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.sites import BeforeDecoder, DecoderLayer, Site
from ..core.stage import ModelShape, Stage
from ..kernels.host import upload
from ..registry import register_selector

__all__ = ["PoolSelector"]


@register_selector
@dataclass(frozen=True)
class PoolSelector(Selector):
    """Cut every frame into K rectangular cells of nearly equal size; the mean of a cell stands at its central token.

    The count is exact for every K and grid: the budget (a ratio rounds half to even, as for all methods) is dealt
    evenly to the frames; the m cells of a frame h x w to ``round(sqrt(m * h / w))`` bands of rows (at least
    ``ceil(m / w)``, at most h); those of a band to its columns. Bands, and cells within a band, differ by one row or
    column at most. With fewer tokens than frames, neighbouring frames share a cell. Several views (tiles) share K by
    the method of largest remainders; a view that gets no token is dropped. Inside the decoder it is hidden states that
    become means; behind a stage that dropped tokens there is no grid any more, and what is left is cut like one row.
    """

    name: ClassVar[str] = "pool"
    paper: ClassVar[str] = "baseline; average pooling of the token grid"
    cost: ClassVar[str] = "N d"
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder, DecoderLayer)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Return one stage before the language model."""
        return (Stage(action=Action.MERGE),)

    def select(self, ctx: VisualContext) -> Selection:
        """Merge into ``min(ctx.budget, N)`` tokens."""
        budget, device = min(ctx.budget, ctx.n), ctx.features.device
        if budget == ctx.n:
            return Selection.full(ctx.n, device)
        keep, assign = _cells(ctx.grids, budget)
        return Selection(ctx.n, upload(keep.clone(), device), upload(assign.clone(), device))


@lru_cache(maxsize=32)
def _cells(grids: tuple[Grid, ...], k: int) -> tuple[Tensor, Tensor]:
    """Return the middles (k,) of `k` cells, and the cell (N,) of every token of `grids`, on the host, for reading."""
    keep: list[Tensor] = []
    assign: list[Tensor] = []
    tokens = cells = 0
    for grid, share in zip(grids, largest_remainder(k, [math.prod(grid) for grid in grids]), strict=True):
        middles, of = _pooled(grid, share)
        keep.append(middles + tokens)
        assign.append(torch.where(of >= 0, of + cells, of))
        tokens, cells = tokens + len(of), cells + share
    return torch.cat(keep), torch.cat(assign)


def _pooled(grid: Grid, k: int) -> tuple[Tensor, Tensor]:
    """Return the middles (k,) of `k` cells, and the cell of every token of a grid, -1 where there is none."""
    t, h, w = grid
    assign = torch.full((t, h, w), -1)
    keep: list[int] = []
    steps = min(t, k)
    for step in range(steps):
        frames = _part(step, steps, t)
        count = len(_part(step, steps, k))
        bands = max(min(round(math.sqrt(count * h / w)), h, count), -(-count // w))
        for band in range(bands):
            rows, cells = _part(band, bands, h), len(_part(band, bands, count))
            for cell in range(cells):
                columns = _part(cell, cells, w)
                assign[frames.start : frames.stop, rows.start : rows.stop, columns.start : columns.stop] = len(keep)
                keep.append((_middle(frames) * h + _middle(rows)) * w + _middle(columns))
    return torch.tensor(keep, dtype=torch.long), assign.flatten()


def _part(number: int, parts: int, total: int) -> range:
    """Return one of `parts` nearly equal consecutive parts of ``range(total)``."""
    return range(number * total // parts, (number + 1) * total // parts)


def _middle(part: range) -> int:
    return part[(len(part) - 1) // 2]
