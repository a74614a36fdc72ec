"""What PruneVID and HoliTom share: places that stay alike through a window of frames become one token.

What is a cell, and what a unit, is worked out on the host, which knows the places and is told how alike they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import kernels
from ..core.selection import Selection
from ..kernels.host import upload
from .frames import group_sums, place_of

__all__ = ["Cells", "Units", "join", "number_cells", "numbers", "peaks", "static_units"]

_NEIGHBOURS = 7  # of a token, in the density of its set


@dataclass(frozen=True, eq=False)
class Cells:
    """The places of every window: tokens that show the same place in the same window are one cell. On the host.

    Attributes
    ----------
    of
        (N,) long: cell of every token.
    frames
        (C,) long: frames of the window of every cell.
    whole
        (C,) bool: there is a token in every frame of the window, and there are several.
    """

    of: Tensor
    frames: Tensor
    whole: Tensor


def number_cells(origin: Tensor, frame: Tensor, window: Tensor) -> Cells:
    """Find the cells of tokens of these frames (N,), where `window` (T,) names the window of every frame."""
    place = place_of(origin)
    _, of = torch.unique(window[frame] * (place.max() + 1) + place, return_inverse=True)
    count = torch.bincount(of)
    frames = torch.zeros_like(count).index_copy_(0, of, torch.bincount(window)[window[frame]])
    return Cells(of, frames, (count == frames) & (frames > 1))


@dataclass(frozen=True, eq=False)
class Units:
    """What is left of a video once static cells are one token each. On the host.

    Attributes
    ----------
    tokens
        (U,) long, ascending: the token that stands for every unit, of a static cell the one in its first frame.
    of
        (N,) long: unit of every token.
    group
        (U,) long, 0 to G - 1: a window's static units are one group, the other units of every frame another.
    static
        (U,) bool.
    """

    tokens: Tensor
    of: Tensor
    group: Tensor
    static: Tensor

    @cached_property
    def sizes(self) -> list[int]:
        """Units of every group."""
        return torch.bincount(self.group).tolist()

    def sizes_of(self, static: bool, counts: Sequence[int] | None = None) -> list[int]:
        """Units, or other `counts`, of the groups that are static, or of those that are not; 0 of the others."""
        kind = torch.zeros(len(self.sizes), dtype=torch.bool).index_copy_(0, self.group, self.static).tolist()
        return [count if so == static else 0 for count, so in zip(counts or self.sizes, kind, strict=True)]

    @cached_property
    def places(self) -> Tensor:
        """(S,) long: which units are static."""
        return self.static.nonzero()[:, 0]

    @property
    def own(self) -> Tensor:
        """(N,) long: group of every token that is a unit by itself, -1 for the others."""
        own = torch.full_like(self.of, -1)
        own[self.tokens[~self.static]] = self.group[~self.static]
        return own

    def means(self, x: Tensor) -> Tensor:
        """(S, D) float32: mean of the tokens `x` (N, D) of every static unit."""
        number = torch.where(self.static, self.static.long().cumsum(0) - 1, -1)[self.of]
        size = torch.bincount(number[number >= 0], minlength=len(self.places))
        total = group_sums(x, upload(number, x.device), len(size), sizes=size.tolist())
        return total.div_(upload(size, x.device)[:, None])

    def selection(self, tokens: Tensor, joined: Tensor) -> Selection:
        """Keep `tokens` (K,), and let every unit flow into the one whose number `joined` (U,) says; -1: drop it.

        A token that is kept becomes the mean of all tokens that flow into it.
        """
        return Selection(len(self.of), tokens, joined[upload(self.of, joined.device)])


def numbers(chosen: Tensor) -> Tensor:
    """(U,) long: number the `chosen` (U,) units in their order; -1 for the others."""
    return torch.where(chosen, chosen.long().cumsum(0) - 1, -1)


def static_units(cells: Cells, likeness: Tensor, least: float, frame: Tensor, window: Tensor, budget: int) -> Units:
    """Make one unit of every whole cell whose `likeness` (C,) is above `least`, and one of every other token.

    Where that leaves fewer units than the budget, the least alike of these cells are taken apart again.
    """
    tokens = torch.arange(len(frame))
    static = cells.whole & (likeness > least)
    lacking = budget - int(len(frame) - ((cells.frames - 1) * static).sum())
    if lacking > 0:
        ranked = likeness.masked_fill(~static, torch.inf).sort(stable=True).indices[: int(static.sum())]
        gained = (cells.frames[ranked] - 1).cumsum(0)
        static[ranked[: int((gained < lacking).sum()) + 1]] = False
    first = torch.full_like(cells.frames, len(frame)).scatter_reduce_(0, cells.of, tokens, reduce="amin")
    within = static[cells.of]
    stands = torch.where(within, first[cells.of], tokens)
    kept = (stands == tokens).nonzero()[:, 0]
    group = torch.where(within, len(frame) + window[frame], frame)[kept]
    return Units(kept, torch.searchsorted(kept, stands), group.unique(return_inverse=True)[1], within[kept])


def peaks(x: Tensor, group: Tensor, sizes: Sequence[int]) -> Tensor:
    """(M,): how good a centre of a cluster of its group every row of `x` (M, D) is (DPC-kNN, 7 neighbours)."""
    return kernels.density_peaks(x, group, _NEIGHBOURS, sizes)


def join(x: Tensor, group: Tensor, number: Tensor, sizes: Sequence[int], centres: Sequence[int]) -> Tensor:
    """(M,) long: the number of the centre of its group that every row of `x` (M, D) is nearest to; -1 of group -1.

    `number` (M,) is that of the centres themselves, which stay with it, and -1 for all other rows. Of a group's rows,
    `sizes` in all, `centres` are some.
    """
    if not sum(centres):
        return torch.full_like(group, -1)
    at = torch.nonzero_static((number >= 0) & (group >= 0), size=sum(centres))[:, 0]
    nearest = kernels.nearest_in_group(x, group, at, "euclidean", sizes=sizes, target_sizes=centres)
    joined = number[at][nearest.clamp(min=0)].masked_fill(nearest < 0, -1)
    return joined.index_copy(0, at, number[at])
