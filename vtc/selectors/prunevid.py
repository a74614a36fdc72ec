"""PruneVID: places that stay alike through a window become one token, and the rest of every frame is clustered."""

from __future__ import annotations

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
from ..kernels.cluster import counts_of
from ..kernels.cosines import with_inverse_norms
from ..kernels.dispatch import queues
from ..registry import register_selector
from .frames import frames_of, shared
from .schedule import check_fraction, check_number
from .static_cells import NEIGHBOURS, Places, places_of, static_units

__all__ = ["PruneVidSelector", "windows_of"]

_SMALL = 14  # units of a group that is not clustered
_BLOCK = 2**22  # numbers that are added up at a time
_COLUMNS = 32  # and at least so many columns
_LONGEST = 5e11  # inverse norms beyond it are of zeros


@register_selector
@dataclass(frozen=True)
class PruneVidSelector(Selector):
    """Merge a video in time where it stands still, then in space.

    **Windows**: the means of the T frames are clustered into ``int(T * segments)`` by density (DPC-kNN with 7
    neighbours, `vtc.kernels.density_peaks`; every frame to the nearest centre). Of each label the longest runs of
    frames stay, if they are longer than one frame; what lies between goes, from the first on, to the neighbour that is
    longer by then, the left one of equals. **In time**: in a window of W frames, a place is static if the mean cosine
    of its tokens to each other, ``(|sum_t u_t|^2 - W) / (W (W - 1))`` with the tokens u scaled to length 1, is above
    `tau`; its tokens become their mean. **In space**: the static places of a window, once, and the other tokens of
    every frame are clustered in the same way, each group by itself, and every cluster becomes its mean. It stands at
    its centre, in the first frame of the window if it is static. Groups of up to 14 are left as they are, if the budget
    allows.

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
        places = places_of(frames)
        window = self.windows(frames.means(x))
        units = static_units(places, window, likeness(x, places, window), self.tau, ctx.budget)
        shares = group_shares(ctx.budget, units.sizes)
        own = shares[: units.frames]
        centre = kernels.density_clusters(x, units.moving, own, NEIGHBOURS, frames.sizes)
        return units.selection(x, centre, shares, ctx.budget)

    def windows(self, means: Tensor) -> Tensor:
        """(T,) long: the window of every frame, given the mean of each (T, D)."""
        one = torch.zeros(len(means), dtype=torch.long, device=means.device)
        count = one.new_full((1,), max(1, int(len(means) * self.segments)))
        return windows_of(kernels.density_clusters(means, one, count, NEIGHBOURS, [len(means)]))


def windows_of(label: Tensor) -> Tensor:
    """(T,) long: turn labels of frames (T,), from 0 to T - 1, into consecutive windows, numbered from 0.

    Of every label the longest runs stay, if they are longer than 1. The stretches between them are taken from the first
    on: each goes to the longer of its neighbours, the left one of equals, and makes it longer. Without any run that
    stays there is one window.
    """
    frames, frame = len(label), torch.arange(len(label), device=label.device)
    run = _numbered(label)
    length = counts_of(run, frames)[run]
    longest = torch.full_like(label, 2).scatter_reduce_(0, label, length, reduce="amax")[label]
    stays = length == longest
    # The last frame up to every one, and the first one from it on, whose run stays.
    left = torch.where(stays, frame, -1).cummax(0).values
    right = torch.where(stays, frame, frames).flip(0).cummin(0).values.flip(0)
    before = torch.nn.functional.pad(left[:-1], (1, 0), value=-1)
    # How long the run on the left of every frame has become. A row of the table says so for any length of it at the
    # frame before: it changes where a run begins that stays. Then rows are applied to each other, twice as many a time.
    begins = stays & (frame == torch.searchsorted(run, run))
    gap, own = (frame - 1 - before)[:, None], length[:, None]
    same = ((before >= 0) & (label == label[before]))[:, None]
    unchanged = torch.arange(frames + 1, device=label.device).expand(frames, -1)
    joined = torch.where(same, unchanged + gap + own, torch.where(unchanged < own, gap + own, own)).clamp(max=frames)
    table = torch.where(begins[:, None], joined, unchanged)
    for step in (2**power for power in range((frames - 1).bit_length())):
        table = torch.cat([table[:step], table[step:].gather(1, table[:-step])])
    lengths = torch.nn.functional.pad(length, (0, 1))  # what is not there, at -1 and T, is of length 0
    goes_left = (right == frames) | (table[:, 0] >= lengths[right])
    return _numbered(label[torch.where(stays | goes_left, left, right).clamp(0, frames - 1)])


def _numbered(label: Tensor) -> Tensor:
    """(T,) long: the number, from 0, of the run of equal labels that every frame is in."""
    return torch.nn.functional.pad((label[1:] != label[:-1]).cumsum(0), (1, 0))


def likeness(x: Tensor, places: Places, window: Tensor) -> Tensor:
    """(W, P) float32: mean cosine of the tokens at every place of a window to each other.

    It is minus infinity where a token is missing. W is the number of windows, or on a GPU, which is not asked, T.
    """
    frames, positions = places.token.shape
    windows = frames if queues(x) else int(window[-1]) + 1
    cell = places.at + (window[places.frame] - places.frame) * positions
    length = counts_of(window, windows)[:, None]
    total, inverse = torch.zeros(windows * positions, device=x.device), with_inverse_norms(x)[1]
    for part in x.split(max(_COLUMNS, _BLOCK // len(total)), dim=1):
        total += kernels.segment_merge(part.float(), cell, len(total), inverse).square_().sum(dim=1)
    # A token of zeros is like none.
    own = torch.zeros_like(total).index_add_(0, cell, (inverse < _LONGEST).float())
    alike = (total - own).view(windows, -1) / (length * (length - 1)).clamp_(min=1)
    return alike.masked_fill_(counts_of(cell, len(total)).view_as(alike) < length, -torch.inf)


def group_shares(budget: int, sizes: Tensor) -> Tensor:
    """(G,) long: divide the budget among groups of these sizes (G,); small ones keep all if each other gets one.

    The others, or else all, get theirs in proportion to their sizes.
    """
    is_small = sizes <= _SMALL
    large = sizes.masked_fill(is_small, 0)
    left = budget - (sizes.sum() - large.sum())
    apart = torch.where(is_small, sizes, shared(left.clamp(min=0).minimum(large.sum()), large))
    return torch.where(left < (large > 0).sum(), shared(budget, sizes), apart)
