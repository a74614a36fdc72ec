"""FastVID: in every frame what the tower attends to, and around dense tokens of a scene the means of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.ranges import Float, Int, Range
from ..core.selection import Selection
from ..core.signals import Origin, Signal
from ..core.sites import BeforeDecoder, Site
from ..registry import register_selector
from .frames import cut_scenes, frame_means, frame_of, lowest_per_group, proportional
from .saliency import SaliencySelector
from .schedule import check_fraction, check_layer, check_number

__all__ = ["FastVidSelector"]

_NEIGHBOURS = 4  # of a token, in the density of its frame


@register_selector
@dataclass(frozen=True)
class FastVidSelector(SaliencySelector):
    """Cut a video into scenes, keep what is salient in every frame, and merge the rest of a scene by density.

    **Segments** are runs of frames. The video is cut at the ``segments - 1`` places where the means of neighbouring
    frames have the lowest cosine, and wherever it is below `tau`. A frame that keeps r tokens keeps
    ``s = r - int(r * context)`` **salient** ones, those with the most attention in the tower. The c = ``int(r *
    context)`` others of each of the L frames of a segment go to its **anchor frames**, those whose distance to the
    segment's last frame is a multiple of `interval`: each gets its part of the c L of them, for the tokens with the
    highest product of density and separation among its own non-salient ones (`vtc.kernels.density_peaks`, 4
    neighbours). In every anchor frame, every non-salient token of the segment joins the **anchor** with the largest
    cosine. Anchor a with m tokens, itself among them, becomes

        w a + (1 - w) * mean of its tokens,    w = max(1 / (m + 1), beta),

    and stays at its place; all other tokens are dropped. With ``interval=1`` frames merge their own tokens only.

    Differences from the released code. Attention and frame features are those of the pooling head of its SigLIP tower,
    which models without that head do not load: here attention is what a token receives in the layer that makes the
    features (or [CLS] attention), and the feature of a frame the mean of its tokens. Counts are exact: a frame gets its
    part of the budget by the method of largest remainders instead of ``int(n * ratio)``, anchor frames share what the
    released code loses to rounding, the first of them one token more, and what an anchor frame has no room for becomes
    salient tokens of the other frames. Videos shorter than `segments` are cut everywhere, where the released code
    fails. A picture is a video of one frame. Of a video that is read in windows every window counts as a video, so that
    segments end there and each window has `segments` of its own.

    Parameters
    ----------
    segments
        Least number of segments, at most the number of frames.
    tau
        Cosine of neighbouring frames below which a segment ends.
    context
        Fraction of the tokens of a frame that goes to merged ones.
    interval
        Frames from one anchor frame to the next.
    beta
        Least weight of an anchor beside the mean.
    score_source
        "received": the attention that a token receives from all others; or "cls".

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", arXiv 2503.11187.
    """

    name: ClassVar[str] = "fastvid"
    paper: ClassVar[str] = "FastVID, arXiv 2503.11187"
    cost: ClassVar[str] = "N^2 d / frames"
    inputs: ClassVar[tuple[str, ...]] = ("video",)
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)
    beside: ClassVar[tuple[Signal, ...]] = (Origin(),)
    action: ClassVar[Action] = Action.MERGE

    score_source: str = "received"
    segments: int = 8
    tau: float = 0.9
    context: float = 0.4
    interval: int = 4
    beta: float = 0.6

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the cut, of the merged tokens and of their anchors."""
        return {"tau": Float(0.5, 1.0), "context": Float(0.0, 1.0), "interval": Int(1, 8), "beta": Float(0.0, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("fastvid", "segments", self.segments, least=1)
        check_number("fastvid", "tau", self.tau, -1, 1)
        check_fraction("fastvid", "context", self.context)
        check_layer("fastvid", "interval", self.interval, least=1)
        check_fraction("fastvid", "beta", self.beta)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose and merge into ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        frame = frame_of(ctx[Origin])
        segment = cut_scenes(frame_means(ctx.features, frame), self.segments, self.tau)
        return self.merged(ctx.features, self.saliency(ctx), frame, segment, ctx.budget)

    def merged(self, x: Tensor, attention: Tensor, frame: Tensor, segment: Tensor, budget: int) -> Selection:
        """Keep `budget` tokens of `x` (N, D).

        Parameters
        ----------
        x
            (N, D).
        attention
            (N,).
        frame
            (N,) long, 0 to T - 1.
        segment
            (T,) long, ascending.
        budget
            Fewer than N.
        """
        sizes = torch.bincount(frame)
        salient, anchors, turn = self._counts(sizes, segment, budget)
        kept = lowest_per_group(-attention, frame, salient)
        peaks = kernels.density_peaks(x, frame.masked_fill(kept | (anchors[frame] == 0), -1), _NEIGHBOURS)
        rest = (~kept).nonzero()[:, 0]
        centre = torch.zeros_like(kept)
        centre[rest] = lowest_per_group(-peaks[rest], frame[rest], anchors)
        keep = (kept | centre).nonzero()[:, 0]
        slot = torch.full_like(frame, -1).index_copy_(0, keep, torch.arange(len(keep), device=keep.device))
        group = (frame if self.interval == 1 else segment[frame]).masked_fill(kept, -1)
        tokens, slots = [kept.nonzero()[:, 0]], [slot[kept]]
        for number in range(int(turn.max()) + 1):  # the first anchor frame of every segment, then the second, ...
            goals = (centre & (turn[frame] == number)).nonzero()[:, 0]
            joined = kernels.nearest_in_group(x, group, goals)
            joined[goals] = torch.arange(len(goals), device=goals.device)  # of equal anchors, each itself
            found = (joined >= 0).nonzero()[:, 0]
            tokens.append(found)
            slots.append(slot[goals[joined[found]]])
        return self._summed(keep, torch.cat(tokens), torch.cat(slots), kept)

    def _counts(self, sizes: Tensor, segment: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
        """Count the salient tokens and the anchors of every frame, and number the anchor frames of each segment.

        Returns
        -------
        Three tensors (T,) long; the last is -1 in frames that are none.
        """
        shares = proportional(budget, sizes)
        context = (shares.double() * self.context).long()
        salient = shares - context
        lengths = torch.bincount(segment)
        starts = lengths.cumsum(0) - lengths
        at = torch.arange(len(sizes), device=sizes.device)
        to_end = (starts + lengths)[segment] - 1 - at
        is_anchor = to_end % self.interval == 0
        before = is_anchor.long().cumsum(0)
        turn = torch.where(is_anchor, before - before[starts][segment] + is_anchor[starts][segment].long() - 1, -1)
        total = torch.zeros_like(lengths).index_add_(0, segment, context)
        frames = torch.zeros_like(lengths).index_add_(0, segment, is_anchor.long())
        each = total // frames
        anchors = each[segment] + (turn < (total % frames)[segment]).long()
        anchors = torch.where(is_anchor, anchors, 0).minimum(sizes - salient)
        left = budget - int(salient.sum() + anchors.sum())
        return salient + proportional(left, sizes - salient - anchors), anchors, turn

    def _summed(self, keep: Tensor, token: Tensor, slot: Tensor, salient: Tensor) -> Selection:
        """Weigh the entries of the merge: `token` (E,) flows into `slot` (E,)."""
        count = torch.bincount(slot, minlength=len(keep)).float()
        own = (1 / (count + 1)).clamp(min=self.beta)
        own = torch.where(salient[keep], 1.0, own)
        weight = ((1 - own) / count)[slot]
        weight = torch.where(token == keep[slot], weight + own[slot], weight)
        return Selection.from_entries(len(salient), keep, token, slot, weight)
