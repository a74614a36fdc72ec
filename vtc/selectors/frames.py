"""What methods share that look at the frames of a video, whatever an earlier stage has left of them.

Where tokens stand is looked at on the host, which knows it; see `vtc.kernels.host`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..budget import largest_remainder
from ..core.context import VisualContext
from ..core.grids import Grid
from ..core.signals import Origin
from ..kernels.host import on_host, upload
from .uniform import evenly

__all__ = [
    "Frames",
    "cut_scenes",
    "earlier_at_place",
    "frame_of",
    "frames_of",
    "group_sums",
    "lowest_per_group",
    "place_of",
    "proportional",
    "shared",
    "spread_over",
]

_BLOCK = 2**20  # numbers that are looked at in float32 at a time
_COLUMNS = 32  # and at least so many columns


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of a video.

    Attributes
    ----------
    origin
        (N, 6) long, on the host: the signal `Origin`.
    on_host, number
        (N,) long, 0 to T - 1: the frame of every token, on the host and where the features are.
    sizes
        Tokens of every frame.
    """

    origin: Tensor
    on_host: Tensor
    number: Tensor
    sizes: list[int]

    def means(self, x: Tensor) -> Tensor:
        """(T, D) float32: mean of the tokens of every frame."""
        count = upload(torch.tensor(self.sizes), x.device)
        return group_sums(x, self.number, len(count)).div_(count[:, None])


def frames_of(ctx: VisualContext) -> Frames:
    """Find the frames of a context with the signal `Origin`."""
    origin = on_host(ctx[Origin])
    frame = frame_of(origin)
    return Frames(origin, frame, upload(frame, ctx.features.device), torch.bincount(frame).tolist())


def frame_of(origin: Tensor) -> Tensor:
    """(N,) long: the frame of every token, 0 to T - 1 in the order of the tokens; `origin` as the signal `Origin`.

    Frames of different views are different, and the views of a picture are a frame each.
    """
    view, time = origin[:, 0], origin[:, 1]
    return torch.unique(view * (time.max() + 1) + time, return_inverse=True)[1]


def place_of(origin: Tensor) -> Tensor:
    """(N,) long: a number for every place of every view, the same in all frames."""
    view, _, row, column, _, width = origin.unbind(dim=1)
    return (view * (row.max() + 1) + row) * width.max() + column


def cut_scenes(means: Tensor, least: int, tau: float) -> Tensor:
    """(T,) long: the scene of every frame, given a feature of each (T, D).

    Scenes end at the ``least - 1`` lowest cosines of neighbouring frames and wherever it is below `tau`.
    """
    earlier = upload(kernels.earlier_tokens(len(means), 1), means.device)
    similarity = kernels.temporal_similarity(means, earlier)[1:]
    ends = (similarity < tau).index_fill_(0, similarity.sort(stable=True).indices[: least - 1], True)
    return torch.nn.functional.pad(ends.cumsum(0), (1, 0))


def group_sums(x: Tensor, group: Tensor, count: int) -> Tensor:
    """(G, D) float32: sum of the rows of `x` (N, D) in each of `count` groups (N,).

    A row of group -1 is in no sum. The same on every device and in every run.
    """
    # In blocks of columns, because other dtypes are copied.
    step = x.shape[1] if x.dtype == torch.float32 else max(_COLUMNS, _BLOCK // max(1, len(x)))
    parts = [kernels.segment_merge(part.float(), group, count) for part in x.split(step, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def earlier_at_place(origin: Tensor, back: Tensor) -> Tensor:
    """(N,) long, on the host: the token at the same place `back` (N,) times before, -1 where there is none."""
    time = origin[:, 1]
    key = place_of(origin) * (time.max() + 1) + time
    ordered, order = key.sort()
    wanted = key - back
    at = torch.searchsorted(ordered, wanted).clamp(max=len(key) - 1)
    # One time too far back is the last of another place.
    there = (ordered[at] == wanted) & (back > 0) & (back <= time)
    return torch.where(there, order[at], -1)


def lowest_per_group(scores: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """(N,) bool: the `counts[g]` lowest scores of every group g, the lower index winning ties.

    Parameters
    ----------
    scores
        (N,) float.
    group
        (N,) long, 0 to G - 1; -1 for tokens of none.
    counts
        (G,) long.
    """
    order = torch.argsort(scores, stable=True)
    of, by_group = group.index_select(0, order).sort(stable=True)
    order = order.index_select(0, by_group)  # by group, and within it by score
    # A group begins at the first of its number.
    place = torch.arange(len(group), device=group.device) - torch.searchsorted(of, of)
    chosen = (of >= 0) & (place < counts.index_select(0, of.clamp(min=0)))
    return torch.empty_like(chosen).index_copy_(0, order, chosen)


def proportional(total: int, sizes: Sequence[int]) -> list[int]:
    """Share `total`, at most the sum of the `sizes`, in proportion to them, exactly."""
    return largest_remainder(total, sizes) if total else [0] * len(sizes)


def shared(total: int | Tensor, sizes: Tensor) -> Tensor:
    """(G,) long: what `proportional` gives to groups of these sizes (G,), which the host need not know."""
    exact, whole = sizes * total, sizes.sum().clamp(min=1)
    shares = exact.div(whole, rounding_mode="floor")
    by_remainder = (exact - shares * whole).sort(descending=True, stable=True).indices
    more = torch.arange(len(sizes), device=sizes.device) < total - shares.sum()
    return shares.index_add_(0, by_remainder, more.long())


def spread_over(tokens: Tensor, budget: int, grids: tuple[Grid, ...]) -> Tensor:
    """(budget,) long, on the host: an even spread over the `tokens`, which are `grids` if all of these are left."""
    complete = len(tokens) == sum(t * h * w for t, h, w in grids)
    return tokens[evenly(grids if complete else ((1, 1, len(tokens)),), budget)]
