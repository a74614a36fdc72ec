"""FastVID: in every frame what the tower attends to, and around dense tokens of a scene the means of the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
from ..kernels.host import on_host, upload
from ..registry import register_selector
from .frames import Frames, cut_scenes, frames_of, lowest_per_group, proportional
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

    A GPU is waited for twice: the anchor frames of a segment follow from its length, and how many there are at most is
    how many anchors a token flows into, which is the shape of the merge.

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
        frames = frames_of(ctx)
        segment = on_host(cut_scenes(frames.means(ctx.features), self.segments, self.tau))
        return self.merged(ctx.features, self.saliency(ctx), frames, segment, ctx.budget)

    def merged(self, x: Tensor, attention: Tensor, frames: Frames, segment: Tensor, budget: int) -> Selection:
        """Keep `budget` tokens of `x` (N, D).

        Parameters
        ----------
        x
            (N, D).
        attention
            (N,).
        frames
            T of them.
        segment
            (T,) long, ascending, on the host.
        budget
            Fewer than N.
        """
        frame, sizes, segments = frames.number, frames.sizes, segment.tolist()
        salient, anchors, turn = self._counts(sizes, segments, budget)
        groups = range(len(sizes)) if self.interval == 1 else segments  # of frames
        numbers = upload(torch.tensor([salient, anchors, turn, list(groups)]), x.device)
        kept = lowest_per_group(-attention, frame, numbers[0])
        others = [size - own for size, own in zip(sizes, salient, strict=True)]
        within = frame.masked_fill(kept | (numbers[1] == 0)[frame], -1)
        looked_at = [other if few else 0 for other, few in zip(others, anchors, strict=True)]
        peaks = kernels.density_peaks(x, within, _NEIGHBOURS, looked_at)
        rest = _places(~kept, sum(others))
        centre = torch.zeros_like(kept)
        centre[rest] = lowest_per_group(-peaks[rest], frame[rest], numbers[1])
        keep = _places(kept | centre, budget)
        slot = torch.full_like(frame, -1).index_copy_(0, keep, torch.arange(len(keep), device=keep.device))
        group, many = numbers[3][frame].masked_fill(kept, -1), _sums(others, groups)
        salient_tokens = _places(kept, sum(salient))
        tokens, slots, most = [salient_tokens], [slot[salient_tokens]], [0] * len(many)
        for number in range(max(turn) + 1):  # the first anchor frame of every segment, then the second, ...
            few = _sums([own if at == number else 0 for own, at in zip(anchors, turn, strict=True)], groups)
            goals = _places(centre & (numbers[2] == number)[frame], sum(few))
            joined = kernels.nearest_in_group(x, group, goals, sizes=many, target_sizes=few)
            joined[goals] = torch.arange(len(goals), device=goals.device)  # of equal anchors, each itself
            found = _places(joined >= 0, sum(size for size, own in zip(many, few, strict=True) if own))
            tokens.append(found)
            slots.append(slot[goals[joined[found]]])
            most = [so_far + bool(own) for so_far, own in zip(most, few, strict=True)]
        return self._summed(keep, torch.cat(tokens), torch.cat(slots), kept, max(most))

    def _counts(
        self, sizes: Sequence[int], segments: Sequence[int], budget: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Count the salient tokens and the anchors of every frame, and number the anchor frames of each segment.

        The numbers are -1 in frames that are none.
        """
        shares = proportional(budget, sizes)
        context = [int(share * self.context) for share in shares]
        salient = [share - part for share, part in zip(shares, context, strict=True)]
        anchors, turn, start = [0] * len(sizes), [-1] * len(sizes), 0
        for _, same in itertools.groupby(segments):
            stop = start + len(list(same))
            at = [t for t in range(start, stop) if (stop - 1 - t) % self.interval == 0]
            each, over = divmod(sum(context[start:stop]), len(at))
            for number, t in enumerate(at):
                turn[t], anchors[t] = number, min(each + (number < over), sizes[t] - salient[t])
            start = stop
        room = [size - own - few for size, own, few in zip(sizes, salient, anchors, strict=True)]
        more = proportional(budget - sum(salient) - sum(anchors), room)
        return [own + some for own, some in zip(salient, more, strict=True)], anchors, turn

    def _summed(self, keep: Tensor, token: Tensor, slot: Tensor, salient: Tensor, most: int) -> Selection:
        """Weigh the entries of the merge: `token` (E,) flows into `slot` (E,), a token into at most `most` slots."""
        count = torch.zeros(len(keep), device=keep.device).index_add_(0, slot, torch.ones_like(slot).float())
        own = (1 / (count + 1)).clamp(min=self.beta)
        own = torch.where(salient[keep], 1.0, own)
        weight = ((1 - own) / count)[slot]
        weight = torch.where(token == keep[slot], weight + own[slot], weight)
        return Selection.from_entries(len(salient), keep, token, slot, weight, most)


def _places(mask: Tensor, count: int) -> Tensor:
    """(count,) long: where the mask is true, which is so `count` times."""
    return torch.nonzero_static(mask, size=count)[:, 0]


def _sums(numbers: Sequence[int], groups: Sequence[int]) -> list[int]:
    """Add up the numbers of every group; the last number is of the last group."""
    total = [0] * (groups[-1] + 1)
    for number, group in zip(numbers, groups, strict=True):
        total[group] += number
    return total
