"""What PruneVID and HoliTom share: places that stay alike through a window of frames become one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.selection import Selection
from .frames import group_sums

__all__ = ["Cells", "Units", "clusters", "number_cells", "static_units"]

_NEIGHBOURS = 7  # of a token, in the density of its set


@dataclass(frozen=True, eq=False)
class Cells:
    """The places of every window: tokens that show the same place in the same window are one cell.

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
    view, _, row, column, _, width = origin.unbind(dim=1)
    place = (view * (row.max() + 1) + row) * width.max() + column
    _, of = torch.unique(window[frame] * (place.max() + 1) + place, return_inverse=True)
    count = torch.bincount(of)
    frames = torch.zeros_like(count).index_copy_(0, of, torch.bincount(window)[window[frame]])
    return Cells(of, frames, (count == frames) & (frames > 1))


@dataclass(frozen=True, eq=False)
class Units:
    """What is left of a video once static cells are one token each.

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

    def means(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """(U, D) float32: mean of the tokens `x` (N, D) of every unit, or of the `chosen` ones, ascending."""
        wide = x[self.tokens if chosen is None else self.tokens[chosen]].float()
        place = torch.arange(len(self.tokens), device=x.device)
        if chosen is not None:
            place = torch.full_like(place, -1).index_copy_(0, chosen, place[: len(chosen)])
        # What stands for a unit is there already; of most units, that is all.
        more = ((self.tokens[self.of] != torch.arange(len(x), device=x.device)) & (place[self.of] >= 0)).nonzero()[:, 0]
        into = place[self.of[more]]
        wide += group_sums(x[more], into, len(wide))
        return wide.div_((1 + torch.bincount(into, minlength=len(wide)))[:, None])

    def selection(self, centres: Tensor, joined: Tensor) -> Selection:
        """Let every unit flow into one of the units `centres` (K,), ascending, whose number `joined` (U,) says.

        -1: it is dropped. A token that is kept becomes the mean of all tokens that flow into it.
        """
        return Selection(len(self.of), self.tokens[centres], joined[self.of])


def static_units(cells: Cells, likeness: Tensor, least: float, frame: Tensor, window: Tensor, budget: int) -> Units:
    """Make one unit of every whole cell whose `likeness` (C,) is above `least`, and one of every other token.

    Where that leaves fewer units than the budget, the least alike of these cells are taken apart again.
    """
    tokens = torch.arange(len(frame), device=frame.device)
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


def clusters(means: Tensor, group: Tensor) -> Tensor:
    """(U,): how good a centre of a cluster of its group every unit is, by density and separation (DPC-kNN, 7)."""
    return kernels.density_peaks(means, group, _NEIGHBOURS)
