"""PruneVID: places that stay alike through a window become one token, and the rest of every frame is clustered."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Origin, Signal
from ..core.sites import BeforeDecoder, Site
from ..core.stage import ModelShape, Stage
from ..kernels.host import on_host, upload
from ..registry import register_selector
from .frames import frames_of, group_sums, lowest_per_group, proportional
from .schedule import check_fraction, check_number
from .static_cells import Cells, join, number_cells, numbers, peaks, static_units

__all__ = ["PruneVidSelector", "runs_of"]

_NEIGHBOURS = 7  # of a frame, in the density of the video
_SMALL = 14  # units of a group that is not clustered


@register_selector
@dataclass(frozen=True)
class PruneVidSelector(Selector):
    """Merge a video in time where it stands still, then in space.

    **Windows**: the means of the T frames are clustered into ``int(T * segments)`` by density (DPC-kNN with 7
    neighbours, `vtc.kernels.density_peaks`; every frame to the nearest centre). Of each label the longest runs of
    frames stay, if they are longer than one frame; what lies between goes to the longer neighbour, the left one of
    equals. **In time**: in a window of W frames, a place is static if the mean cosine of its tokens to each other,
    ``(|sum_t u_t|^2 - W) / (W (W - 1))`` with the tokens u scaled to length 1, is above `tau`; its tokens become their
    mean. **In space**: the static places of a window, once, and the other tokens of every frame are clustered in the
    same way, each group by itself, and every cluster becomes its mean. It stands at its centre, in the first frame of
    the window if it is static. Groups of up to 14 are left as they are, if the budget allows.

    This is the stage of the paper before the decoder. Its second one, which lets the question choose among these tokens
    at decoder layer 10 and takes the others from the caches of the layers before it too, is left out; `fastv` behind
    this method chooses by attention as well, but leaves those caches as they are. Other differences from the released
    code, which is for PLLaVA alone: The number of clusters follows from the budget, shared among the groups in
    proportion to their sizes, where the released code makes ``int(n * 0.5)`` of each. Groups that get no share are
    dropped. Where static places leave fewer tokens than the budget, those that are least alike are not merged. Equal
    densities go to the lower index, where the released code adds noise; and in a window of one frame nothing is static,
    where it computes 0 / 0. A picture is a video of one frame. Of a video that is read in windows, each of those counts
    as a video.

    Parameters
    ----------
    segments
        Clusters of frames, as a fraction of the frames; at least one.
    tau
        Mean cosine above which a place is static.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", arXiv 2412.16117.
    """

    name: ClassVar[str] = "prunevid"
    paper: ClassVar[str] = "PruneVID, arXiv 2412.16117"
    cost: ClassVar[str] = "N^2 d / frames"
    inputs: ClassVar[tuple[str, ...]] = ("video",)
    requires: ClassVar[tuple[Signal, ...]] = (Origin(),)
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)

    segments: float = 0.25
    tau: float = 0.8

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the number of windows and of the threshold."""
        return {"segments": Float(0.05, 1.0), "tau": Float(0.5, 1.0)}

    def __post_init__(self) -> None:
        check_fraction("prunevid", "segments", self.segments)
        check_number("prunevid", "tau", self.tau, -1, 1)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model."""
        return (Stage(requires=self.requires, action=Action.MERGE),)

    def select(self, ctx: VisualContext) -> Selection:
        """Merge into ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        x, frames = ctx.features, frames_of(ctx)
        window = self.windows(frames.means(x))
        cells = number_cells(frames.origin, frames.on_host, window)
        alike = on_host(likeness(x, cells))
        units = static_units(cells, alike, self.tau, frames.on_host, window, ctx.budget)
        shares = group_shares(ctx.budget, units.sizes)
        moving, still = ((units.sizes_of(kind), units.sizes_of(kind, shares)) for kind in (False, True))
        own, group, tokens, static = (upload(y, x.device) for y in (units.own, units.group, units.tokens, units.places))
        means, of = units.means(x), group[static]
        scores = peaks(x, own, moving[0])[tokens].index_copy_(0, static, peaks(means, of, still[0]))
        chosen = lowest_per_group(-scores, group, upload(torch.tensor(shares), x.device))
        number = numbers(chosen)
        of_tokens = torch.full_like(own, -1).index_copy_(0, tokens, number)
        joined = join(x, own, of_tokens, *moving)[tokens]
        joined = joined.index_copy_(0, static, join(means, of, number[static], *still))
        return units.selection(tokens[torch.nonzero_static(chosen, size=ctx.budget)[:, 0]], joined)

    def windows(self, means: Tensor) -> Tensor:
        """(T,) long, on the host: the window of every frame, given the mean of each (T, D); one wait for a GPU."""
        count = max(1, int(len(means) * self.segments))
        one = torch.zeros(len(means), dtype=torch.long, device=means.device)
        peaks = kernels.density_peaks(means, one, _NEIGHBOURS, [len(means)])
        centres = peaks.sort(descending=True, stable=True).indices[:count]
        labels = kernels.nearest_in_group(means, one, centres, "euclidean", sizes=[len(means)], target_sizes=[count])
        labels[centres] = torch.arange(len(centres), device=centres.device)
        return torch.tensor(runs_of(labels.tolist()))


def runs_of(labels: Sequence[int]) -> list[int]:
    """Turn labels of frames into consecutive windows, numbered from 0.

    Of every label the longest runs stay, if they are longer than 1. A stretch between them goes to the longer of its
    neighbours, the left one of equals. Without any there is one window.
    """
    runs = [(label, len(list(same))) for label, same in itertools.groupby(labels)]
    longest: dict[int, int] = {}
    for label, length in runs:
        longest[label] = max(length, longest.get(label, 2))
    kept = [at for at, (label, length) in enumerate(runs) if length == longest[label]]
    if not kept:
        return [0] * len(labels)
    refined: list[int] = []
    for at, (_, length) in enumerate(runs):
        left, right = bisect.bisect_right(kept, at) - 1, bisect.bisect_left(kept, at)
        nearest = [kept[place] for place in (left, right) if 0 <= place < len(kept)]
        winner = max(nearest, key=lambda run: runs[run][1])  # the first of equals
        refined += [runs[winner][0]] * length
    return [number for number, (_, same) in enumerate(itertools.groupby(refined)) for _ in same]


def likeness(x: Tensor, cells: Cells) -> Tensor:
    """(C,) float32: mean cosine of the tokens of every cell to each other; 0 of a single token."""
    of, frames = upload(cells.of, x.device), upload(cells.frames, x.device)
    total = group_sums(x, of, len(frames), unit=True, sizes=torch.bincount(cells.of).tolist())
    length = torch.linalg.vector_norm(x, dim=1)
    own = torch.zeros_like(frames).index_add_(0, of, (length > 0).long())  # a token of zeros is like none
    return (total.square_().sum(dim=1) - own) / (frames * (frames - 1)).clamp(min=1)


def group_shares(budget: int, sizes: Sequence[int]) -> list[int]:
    """Divide the budget among groups of these sizes; small ones keep all, if each other gets one at least.

    The others, or else all, get theirs in proportion to their sizes.
    """
    large = [size if size > _SMALL else 0 for size in sizes]
    left = budget - (sum(sizes) - sum(large))
    if left < sum(size > 0 for size in large):
        return proportional(budget, sizes)
    shares = proportional(min(left, sum(large)), large)
    return [share if size > _SMALL else size for size, share in zip(sizes, shares, strict=True)]
