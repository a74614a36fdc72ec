"""FlashVID: in every frame a subset attended to and diverse, and trees of what stays alike from frame to frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.signals import Origin, Signal
from ..core.sites import BeforeDecoder, Site
from ..kernels.cluster import counts_of, gathered_rows, padded_groups
from ..kernels.host import upload
from ..registry import register_selector
from .frames import Frames, cut_scenes, frames_of, proportional, shared
from .saliency import SaliencySelector
from .schedule import check_fraction, check_layer, check_number
from .static_cells import clustered_means

__all__ = ["FlashVidSelector", "attended_and_diverse"]

_ELEMENTS = 2**22  # cosines, and features, held at a time


@register_selector
@dataclass(frozen=True)
class FlashVidSelector(SaliencySelector):
    """Keep diverse tokens that the tower attends to in every frame, and merge the others along trees through time.

    Frames share the budget in proportion to their tokens; of its r tokens a frame spends ``int(alpha * r)`` on the
    first part. **Attention and diversity**: with ``C_ij = (1 - cosine(x_i, x_j)) * a_j``, a the attention in the tower,
    the first is the token j whose second smallest entry ``C_ij`` over the frame's i is largest, then in every step the
    one whose smallest entry over the kept i is. **Trees**: the video is cut into scenes as `fastvid` does. Each other
    token is linked to the most similar of the other tokens one frame earlier in its scene, if their cosine is above
    `link`; the tokens of a tree become their mean, at its root. **Clusters**: the roots of every frame are clustered by
    density (DPC-kNN with 7 neighbours) into what is left of its part; every cluster becomes the mean of its trees, at
    its centre.

    After the released code, of which the equations of the first part are public as numbers too; of the others only the
    rule. What that leaves open is decided here: tokens of the first part are in no tree, trees count alike in a
    cluster, and the number of neighbours is that of PruneVID. Where trees leave fewer tokens than the budget, the
    weakest links are cut; what a frame has no roots for goes to the others. Two things are left out: the released code
    keeps a quarter more before the decoder and removes most of that in front of its layer 20 by attention (`fastv`
    behind this method does the like), and its attention is that of SigLIP's pooling head where there is one; here it is
    what a token receives in the layer that makes the features, or [CLS] attention. A picture is a video of one frame.
    Of a video that is read in windows, each of those counts as a video.

    Parameters
    ----------
    segments
        Least number of scenes, at most the number of frames.
    tau
        Cosine of neighbouring frames' means below which a scene ends.
    alpha
        Fraction of the tokens of a frame that attention and diversity choose.
    link
        Cosine above which a token is linked to one of the frame before.
    score_source
        "received": the attention that a token receives from all others; or "cls".

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging",
    ICLR 2026, https://openreview.net/forum?id=H6rDX4w6Al.
    """

    name: ClassVar[str] = "flashvid"
    paper: ClassVar[str] = "FlashVID, ICLR 2026, openreview.net/forum?id=H6rDX4w6Al"
    cost: ClassVar[str] = "N^2 d / frames"
    inputs: ClassVar[tuple[str, ...]] = ("video",)
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)
    beside: ClassVar[tuple[Signal, ...]] = (Origin(),)
    action: ClassVar[Action] = Action.MERGE

    score_source: str = "received"
    segments: int = 8
    tau: float = 0.9
    alpha: float = 0.7
    link: float = 0.8

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the cut, of the first part and of the links."""
        return {"tau": Float(0.5, 1.0), "alpha": Float(0.0, 1.0), "link": Float(0.5, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("flashvid", "segments", self.segments, least=1)
        check_number("flashvid", "tau", self.tau, -1, 1)
        check_fraction("flashvid", "alpha", self.alpha)
        check_number("flashvid", "link", self.link, -1, 1)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose and merge into ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        x, frames = ctx.features, frames_of(ctx)
        shares = proportional(ctx.budget, frames.sizes)
        first = [int(share * self.alpha) for share in shares]
        others = [size - own for size, own in zip(frames.sizes, first, strict=True)]
        kept = attended_and_diverse(x, self.saliency(ctx), frames.sizes, first)
        segment = cut_scenes(frames.means(x), self.segments, self.tau)
        left = ctx.budget - sum(first)
        root = self._trees(x, frames, segment, kept, others, left)
        tokens = torch.arange(ctx.n, device=x.device)
        frame = frames.number.masked_fill(kept | (root != tokens), -1)
        found = counts_of(frame, len(others))
        counts = found.minimum(upload(torch.tensor(shares) - torch.tensor(first), x.device))
        counts += shared(left - counts.sum(), found - counts)
        centre = clustered_means(x, root, frame, counts, others, sum(others))
        stays = kept | (centre == tokens)
        target = torch.where(kept, tokens, centre[root])
        assign = torch.where(target < 0, -1, (stays.cumsum(0) - 1)[target.clamp(min=0)])
        size, trees = counts_of(root, ctx.n), counts_of(centre, ctx.n)
        weight = 1 / (size[root] * trees[target.clamp(min=0)]).clamp(min=1)
        keep = torch.nonzero_static(stays, size=ctx.budget)[:, 0]
        return Selection(ctx.n, keep, assign, torch.where(kept, 1.0, weight))

    def _trees(
        self, x: Tensor, frames: Frames, segment: Tensor, kept: Tensor, others: Sequence[int], least: int
    ) -> Tensor:
        """(N,) long: the root of the tree of every token; that of a `kept` one is itself. At least `least` others."""
        tokens = torch.arange(len(x), device=x.device)
        # Whether a frame continues the scene of the one before it.
        goes_on = torch.nn.functional.pad(segment[1:] == segment[:-1], (1, 0))
        group = frames.number.masked_fill(kept | ~goes_on[frames.number], -1)
        earlier = torch.nonzero_static(~kept, size=sum(others))[:, 0]
        nearest = kernels.nearest_in_group(
            x, group, earlier, target_group=frames.number[earlier] + 1, sizes=[*others, 0], target_sizes=[0, *others]
        )
        parent = torch.where(nearest >= 0, earlier[nearest.clamp(min=0)], -1)
        closeness = kernels.temporal_similarity(x, parent)
        linked = (parent >= 0) & (closeness > self.link)
        # The weakest are cut where there would be too few trees.
        lacking = least - (sum(others) - linked.sum())
        order = closeness.masked_fill(~linked, torch.inf).sort(stable=True).indices
        linked &= torch.empty_like(order).index_copy_(0, order, tokens) >= lacking
        root = torch.where(linked, parent, tokens)
        for _ in range((len(others) - 1).bit_length()):  # every step doubles how far a token sees
            root = root[root]
        return root


def attended_and_diverse(x: Tensor, attention: Tensor, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """(N,) bool: in every frame the `counts` (T,) tokens of greedy max-min under ``(1 - cosine) * attention``.

    Frames are processed side by side, in blocks of bounded memory.

    Parameters
    ----------
    x
        (N, D), frame after frame.
    attention
        (N,), not negative: what scales the distances to a token.
    sizes, counts
        Tokens of each frame, at least 1, and how many of them to choose, at most all.
    """
    longest = max(sizes)
    step = max(1, _ELEMENTS // (longest * max(longest, x.shape[1])))
    tokens = torch.arange(len(x), device=x.device)
    table = torch.tensor([list(accumulate(sizes, initial=0))[:-1], sizes, counts])
    starts, lengths, wanted = upload(table, x.device).unbind(0)
    chosen = torch.zeros(len(x) + 1, dtype=torch.bool, device=x.device)  # what is not there is written behind the last
    for start in range(0, len(sizes), step):
        part = slice(start, start + step)
        index = padded_groups(tokens, starts[part], lengths[part], max(sizes[part]))
        exists, at = index < len(x), index.clamp(max=len(x) - 1)
        picked = _max_min(gathered_rows(x, at), attention[at].float(), exists, wanted[part, None], max(counts[part]))
        chosen.scatter_(0, index.flatten(), picked.flatten())
    return chosen[:-1]


def _max_min(x: Tensor, attention: Tensor, exists: Tensor, counts: Tensor, most: int) -> Tensor:
    """(G, m) bool: the `counts` (G, 1) picks, at most `most`, in groups of features `x` (G, m, D), written over."""
    x /= torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_(min=1e-12)
    apart = (x @ x.transpose(1, 2)).neg_().add_(1).clamp_(min=0).mul_(attention[:, None])
    apart.masked_fill_(~exists[..., None], torch.inf)  # rows that are not there are far from everything
    second = apart.topk(min(2, apart.shape[1]), dim=1, largest=False).values[:, -1]
    near = torch.where(second == torch.inf, attention, second).masked_fill(~exists, -torch.inf)
    picked = torch.zeros_like(exists)
    groups, places = (torch.arange(size, device=x.device) for size in exists.shape)
    for step in range(most):
        best = near.argmax(dim=1)  # the first of equals
        picked |= (places == best[:, None]) & (counts > step)
        row = apart[groups, best]
        near = torch.minimum(near, row) if step else row.masked_fill(~exists, -torch.inf)
        near = near.masked_fill(picked, -torch.inf)
    return picked
