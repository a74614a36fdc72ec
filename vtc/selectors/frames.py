"""What methods share that look at the frames of a video, whatever an earlier stage has left of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..budget import largest_remainder
from ..core.context import VisualContext
from ..core.grids import Grid
from .uniform import UniformSelector

__all__ = [
    "cut_scenes",
    "earlier_at_place",
    "frame_means",
    "frame_of",
    "group_sums",
    "lowest_per_group",
    "place_of",
    "proportional",
    "spread_over",
]

_BLOCK = 2**20  # numbers that are looked at in float32 at a time


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


def frame_means(x: Tensor, frame: Tensor) -> Tensor:
    """(T, D) float32: mean of the tokens of every frame."""
    count = torch.bincount(frame)
    return group_sums(x, frame, len(count)).div_(count[:, None])


def cut_scenes(means: Tensor, least: int, tau: float) -> Tensor:
    """(T,) long: the scene of every frame, given a feature of each (T, D).

    Scenes end at the ``least - 1`` lowest cosines of neighbouring frames and wherever it is below `tau`.
    """
    similarity = kernels.temporal_similarity(means, kernels.earlier_tokens(len(means), 1).to(means.device))[1:]
    ends = similarity < tau
    ends[similarity.sort(stable=True).indices[: least - 1]] = True
    return torch.nn.functional.pad(ends.long().cumsum(0), (1, 0))


def group_sums(x: Tensor, group: Tensor, count: int, unit: bool = False) -> Tensor:
    """(G, D) float32: sum of the rows of `x` (N, D) in each of `count` groups (N,), scaled to length 1 if `unit`.

    A row of group -1 is in no sum. The same on every device and in every run, in blocks that fit into a cache.
    """
    total = x.new_zeros(count, x.shape[1], dtype=torch.float32)
    order = (group >= 0).nonzero()[:, 0]
    order = order[group[order].argsort(stable=True)]
    blocks = order.split(max(1, _BLOCK // max(1, x.shape[1]))) if len(order) else ()
    for rows, (first, last) in zip(blocks, _ends(group, blocks), strict=True):
        part = x.index_select(0, rows).float()
        part = torch.nn.functional.normalize(part, dim=1, eps=1e-12) if unit else part
        total[first : last + 1] += kernels.segment_merge(part, group[rows] - first, last - first + 1)
    return total


def _ends(group: Tensor, blocks: Sequence[Tensor]) -> list[list[int]]:
    """Return the groups of the first and the last token of every block, with one transfer."""
    return torch.stack([group[rows[[0, -1]]] for rows in blocks]).tolist() if blocks else []


def earlier_at_place(origin: Tensor, back: Tensor) -> Tensor:
    """(N,) long: the token at the same place `back` (N,) times before, -1 where there is none."""
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
        (N,) long, 0 to G - 1.
    counts
        (G,) long.
    """
    by_score = torch.argsort(scores, stable=True)
    order = by_score[torch.argsort(group[by_score], stable=True)]  # by group, and within it by score
    sizes = torch.bincount(group, minlength=len(counts))
    place = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
    chosen = torch.zeros(len(group), dtype=torch.bool, device=group.device)
    chosen[order] = place < counts[group[order]]
    return chosen


def proportional(total: int, sizes: Tensor) -> Tensor:
    """(G,) long: `total`, at most the sum of the `sizes` (G,), in proportion to them, exactly."""
    if not total:
        return torch.zeros_like(sizes)
    return torch.tensor(largest_remainder(total, sizes.tolist()), device=sizes.device)


def spread_over(ctx: VisualContext, tokens: Tensor, budget: int, grids: tuple[Grid, ...]) -> Tensor:
    """(budget,) long: an even spread over the `tokens`, which are `grids` if all of these are left."""
    complete = len(tokens) == sum(t * h * w for t, h, w in grids)
    part = VisualContext(
        features=ctx.features[tokens],
        budget=budget,
        generator=ctx.generator,
        grids=grids if complete else ((1, 1, len(tokens)),),
    )
    return tokens[UniformSelector().select(part).keep]
