"""FlashVID: in every frame a subset attended to and diverse, and trees of what stays alike from frame to frame."""

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
from ..core.signals import Origin, Signal
from ..core.sites import BeforeDecoder, Site
from ..kernels.cluster import padded_groups
from ..registry import register_selector
from .frames import cut_scenes, frame_means, frame_of, group_sums, lowest_per_group, proportional
from .saliency import SaliencySelector
from .schedule import check_fraction, check_layer, check_number
from .static_cells import join, peaks

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
        x, frame = ctx.features, frame_of(ctx[Origin])
        shares = proportional(ctx.budget, torch.bincount(frame))
        first = (shares.double() * self.alpha).long()
        kept = attended_and_diverse(x, self.saliency(ctx), frame, first)
        segment = cut_scenes(frame_means(x, frame), self.segments, self.tau)
        root = self._trees(x, frame, segment, kept, ctx.budget - int(first.sum()))
        tokens = torch.arange(ctx.n, device=x.device)
        roots = ((root == tokens) & ~kept).nonzero()[:, 0]
        tree = torch.searchsorted(roots, root).masked_fill(kept, -1)
        size = torch.bincount(tree[~kept], minlength=len(roots))
        means = group_sums(x, tree, len(roots)).div_(size[:, None])
        found = torch.bincount(frame[roots], minlength=len(shares))
        counts = (shares - first).minimum(found)
        counts = counts + proportional(ctx.budget - int((first + counts).sum()), found - counts)
        chosen = lowest_per_group(-peaks(means, frame[roots]), frame[roots], counts)
        keep = torch.cat([kept.nonzero()[:, 0], roots[chosen]]).sort().values
        number = torch.full_like(roots, -1)
        number[chosen] = torch.searchsorted(keep, roots[chosen])
        slot = join(means, frame[roots], number)
        assign = torch.where(kept, torch.searchsorted(keep, tokens), slot[tree.clamp(min=0)] if len(roots) else -1)
        trees = torch.bincount(slot[slot >= 0], minlength=len(keep))
        weight = 1 / (size[tree.clamp(min=0)] * trees[assign.clamp(min=0)]).clamp(min=1) if len(roots) else kept.float()
        return Selection(ctx.n, keep, assign, torch.where(kept, 1.0, weight))

    def _trees(self, x: Tensor, frame: Tensor, segment: Tensor, kept: Tensor, least: int) -> Tensor:
        """(N,) long: the root of the tree of every token; that of a `kept` one is itself. At least `least` others."""
        tokens = torch.arange(len(x), device=x.device)
        # Whether a frame continues the scene of the one before it.
        goes_on = torch.zeros_like(segment, dtype=torch.bool)
        goes_on[1:] = segment[1:] == segment[:-1]
        parent = torch.full_like(tokens, -1)
        for odd in (0, 1):  # frames 0 and 1, 2 and 3, ...; then 1 and 2, 3 and 4, ...
            later = (frame + odd) % 2 == 1
            pair = ((frame + odd) // 2).masked_fill(kept | (later & ~goes_on[frame]), -1)
            earlier = (~later & ~kept).nonzero()[:, 0]
            nearest = kernels.nearest_in_group(x, pair, earlier)
            linked = (later & (nearest >= 0)).nonzero()[:, 0]
            parent[linked] = earlier[nearest[linked]]
        closeness = kernels.temporal_similarity(x, parent)
        linked = ((parent >= 0) & (closeness > self.link)).nonzero()[:, 0]
        lacking = least - (len(x) - int(kept.sum()) - len(linked))
        linked = linked[closeness[linked].sort(stable=True).indices[max(0, lacking) :]]
        root = tokens.clone()
        root[linked] = parent[linked]
        for _ in range(int(frame[-1]).bit_length()):  # every step doubles how far a token sees
            root = root[root]
        return root


def attended_and_diverse(x: Tensor, attention: Tensor, frame: Tensor, counts: Tensor) -> Tensor:
    """(N,) bool: in every frame the `counts` (T,) tokens of greedy max-min under ``(1 - cosine) * attention``.

    Frames are processed side by side, in blocks of bounded memory.

    Parameters
    ----------
    x
        (N, D).
    attention
        (N,), not negative: what scales the distances to a token.
    frame
        (N,) long, 0 to T - 1, ascending.
    counts
        (T,) long, at most the tokens of each frame.
    """
    members, there = padded_groups(torch.arange(len(x), device=x.device), frame)
    longest = members.shape[1]
    step = max(1, _ELEMENTS // (longest * max(longest, x.shape[1])))
    chosen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for index, exists, count in zip(members.split(step), there.split(step), counts.split(step), strict=True):
        picked = _max_min(x[index].float(), attention[index].float(), exists, count)
        chosen[index[picked]] = True
    return chosen


def _max_min(x: Tensor, attention: Tensor, exists: Tensor, counts: Tensor) -> Tensor:
    """(G, m) bool: the picks in groups of features `x` (G, m, D)."""
    unit = torch.nn.functional.normalize(x, dim=2, eps=1e-12)
    apart = (1 - unit @ unit.transpose(1, 2)).clamp_(min=0) * attention[:, None]
    apart.masked_fill_(~exists[..., None], torch.inf)  # rows that are not there are far from everything
    second = apart.topk(min(2, apart.shape[1]), dim=1, largest=False).values[:, -1]
    near = torch.where(second == torch.inf, attention, second).masked_fill(~exists, -torch.inf)
    picked = torch.zeros_like(exists)
    groups = torch.arange(len(x), device=x.device)
    for step in range(int(counts.max())):
        best = near.argmax(dim=1)  # the first of equals
        wanted = counts > step
        picked[groups[wanted], best[wanted]] = True
        row = apart[groups, best]
        near = torch.minimum(near, row) if step else row.masked_fill(~exists, -torch.inf)
        near = near.masked_fill(picked, -torch.inf)
    return picked
