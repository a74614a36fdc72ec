"""Uniform selection: a grid-aware stride, the second baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import largest_remainder
from ..core.context import VisualContext
from ..core.grids import Grid
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.sites import BeforeDecoder, CacheAfterPrefill, DecoderLayer, Pixels, Site, VisionLayer
from ..kernels.host import upload
from ..registry import register_selector

__all__ = ["UniformSelector", "evenly"]

_GOLDEN = (math.sqrt(5) - 1) / 2


@register_selector
@dataclass(frozen=True)
class UniformSelector(Selector):
    """Keep K tokens spread evenly over time, rows and columns.

    The rule, for one view (t, h, w): K tokens are dealt evenly to the t frames; the m tokens of a frame to about
    ``sqrt(m * h / w)`` equidistant rows (never so few that a row overflows), so that neighbours stand as far apart
    vertically as horizontally; the tokens of a row to its columns. Dealing m tokens to n places puts token j at place
    ``floor((j + phase) * n / m)``. The first phase is 1/2, the centre, and it advances by the golden ratio from one
    frame or row to the next: with one phase everywhere the stride would see only a few columns of a picture, and only
    a few places of a video.

    Several views (tiles) share K by the method of largest remainders. Deterministic; exact for every K.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline; strided sampling of the token grid"
    cost: ClassVar[str] = "N"
    sites: ClassVar[tuple[type[Site], ...]] = (
        Pixels,
        VisionLayer,
        BeforeDecoder,
        DecoderLayer,
        CacheAfterPrefill,
    )
    reads_features: ClassVar[bool] = False

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        return Selection(ctx.n, upload(evenly(ctx.grids, min(ctx.budget, ctx.n)).clone(), ctx.features.device))


@lru_cache(maxsize=32)
def evenly(grids: tuple[Grid, ...], k: int) -> Tensor:
    """(k,) long, ascending, on the host: tokens that are spread evenly over `grids`, for reading only."""
    sizes = [math.prod(grid) for grid in grids]
    kept, start = [], 0
    for view, (grid, size, share) in enumerate(zip(grids, sizes, largest_remainder(k, sizes), strict=True)):
        kept.append(start + _deal(share, grid, view))
        start += size
    return torch.cat(kept)


def _deal(k: int, grid: Grid, view: int) -> Tensor:
    """(k,) long, ascending: raster indices of `k` tokens spread over `grid`; `view` shifts the first phase."""
    t, h, w = grid
    frame = _Groups(torch.zeros(k, dtype=torch.long)).deal(t, view)
    frames = _Groups(frame)
    rows = (frames.count * h / w).sqrt().round().long()
    rows = torch.minimum(rows.clamp(max=h), frames.count).maximum((frames.count + w - 1) // w)
    nth_row = frames.deal(rows)
    row = ((nth_row + frames.phase(view)) * h / rows[frames.of]).long()
    index = frame * h + row
    return index * w + _Groups(index).deal(w, view)


class _Groups:
    """Runs of equal values in an ascending (k,) tensor, each a set of tokens to be dealt to places."""

    def __init__(self, values: Tensor) -> None:
        _, self.of, self.count = values.unique_consecutive(return_inverse=True, return_counts=True)
        self.order = torch.arange(values.numel()) - (self.count.cumsum(0) - self.count)[self.of]

    def phase(self, first: int) -> Tensor:
        """(k,) phase of every token's group."""
        return ((0.5 + _GOLDEN * (first + torch.arange(self.count.numel(), dtype=torch.float64))) % 1)[self.of]

    def deal(self, places: int | Tensor, first: int | None = None) -> Tensor:
        """(k,) place of every token; `first` None: all phases 1/2."""
        phase = 0.5 if first is None else self.phase(first)
        size = places if isinstance(places, int) else places[self.of]
        return ((self.order + phase) * size / self.count[self.of]).long()
