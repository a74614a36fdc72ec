"""HoloV: a share for every part of the picture, and in it the tokens that [CLS] looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.signals import PreProjector, Signal
from ..kernels.host import upload
from ..registry import register_selector
from .saliency import SaliencySelector
from .schedule import check_layer, check_number

__all__ = ["HoloVSelector"]

_ATTENTION = 1000.0  # scale of attention beside the variance
_BLOCK = 512  # rows of the similarity matrix computed at a time


@register_selector
@dataclass(frozen=True)
class HoloVSelector(SaliencySelector):
    """Give every crop of the picture a share of the budget, and keep in it what [CLS] looks at most.

    The tokens are cut into `crops` runs of nearly equal length; the first get the tokens that are left over. A crop of
    n tokens is worth the mean over them of ``A_i + diversity * V_i``: A is 1000 times the [CLS] attention of the layer
    that makes the features, averaged over heads; V_i is ``sum_j (S_ij - mu_i)^2 / (n - 1)`` with the cosines S of the
    features before the projector, their diagonal set to 0, and ``mu_i = sum_j S_ij / (n - 1)``, scaled so that its mean
    in the crop is that of A. A crop of one token is worth its attention itself, unscaled, as released. Of the budget K
    a crop gets ``floor(K * worth / (sum of worths + 1e-6))``, and the best crops one token more until K is met.

    What a crop gets beyond its tokens goes to the others, the best first, where the released code returns tokens of
    zeros or too few. Tokens keep their order in the picture, where the released code leaves those of a crop by
    attention. The paper's stage that fetches tokens back is in no released code, and is not here.

    Parameters
    ----------
    crops
        Number of crops, 16 as released for LLaVA; None: ``int(1024 / 576 * N / K)``, as released for Qwen2.5-VL.
    diversity
        Weight of the variance beside the attention.
    score_source
        "cls", or "received": the attention that a token receives from all others, for towers without a [CLS] token.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", arXiv 2510.02912.
    """

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "HoloV, arXiv 2510.02912"
    cost: ClassVar[str] = "K N d"
    reads_features: ClassVar[bool] = False
    beside: ClassVar[tuple[Signal, ...]] = (PreProjector(),)

    crops: int | None = 16
    diversity: float = 0.09

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops is not None:
            check_layer("holov", "crops", self.crops, least=1)
        check_number("holov", "diversity", self.diversity, 0)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        attention = self.saliency(ctx)
        crops = max(1, int(1024 / 576 * ctx.n / ctx.budget)) if self.crops is None else self.crops
        crops = min(crops, ctx.n)
        sizes = [ctx.n // crops + (crop < ctx.n % crops) for crop in range(crops)]
        parts = zip(ctx[PreProjector].split(sizes), attention.split(sizes), strict=True)
        worth = torch.stack([self._worth(*part) for part in parts])
        shares = _shares(worth, upload(torch.tensor(sizes), worth.device), ctx.budget)
        # By crop, then by attention: the first tokens of every crop stay.
        crop = torch.arange(crops).repeat_interleave(torch.tensor(sizes))
        starts = upload(torch.tensor([0, *sizes[:-1]]).cumsum(0)[crop], worth.device)
        crop = upload(crop, worth.device)
        order = attention.sort(descending=True, stable=True).indices
        order = order[crop[order].sort(stable=True).indices]
        stays = torch.arange(ctx.n, device=order.device) - starts < shares[crop]
        kept = torch.zeros_like(stays).index_put_((order,), stays)
        return Selection(ctx.n, torch.nonzero_static(kept, size=ctx.budget)[:, 0])

    def _worth(self, x: Tensor, attention: Tensor) -> Tensor:
        """Compute what one crop is worth, a scalar."""
        n = len(x)
        if n == 1:
            return attention.mean()
        x = x.float()
        unit = x / (x.norm(dim=1, keepdim=True) + 1e-6)
        variance = torch.empty_like(attention)
        for start in range(0, n, _BLOCK):
            rows = slice(start, start + _BLOCK)
            similarity = unit[rows] @ unit.T
            similarity.diagonal(start).fill_(0.0)
            similarity -= similarity.sum(dim=1, keepdim=True) / (n - 1)
            variance[rows] = similarity.square_().sum(dim=1) / (n - 1)
        scaled = _ATTENTION * attention
        variance *= scaled.abs().mean() / (variance.mean() + 1e-6)
        return (scaled + self.diversity * variance).mean()


def _shares(worth: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """(P,) long: divide `budget` tokens, fewer than there are, among crops of these sizes (P,) by their worth (P,).

    What is left of the rounded shares goes round, one to every crop that has room, the worthiest first.
    """
    weight = worth / (worth.sum() + 1e-6)
    shares = torch.minimum((weight * budget).long().clamp(min=0), sizes)
    left, room = budget - shares.sum(), sizes - shares
    # Rounds end for a crop when it is full: how many tokens are given once the crops with the least room are.
    least = room.sort().values
    full = torch.arange(len(room), device=room.device)
    given = least.cumsum(0) + least * (len(room) - 1 - full)
    done = (given <= left).sum()  # crops that are filled
    before = torch.where(done > 0, given.gather(0, (done - 1).clamp(min=0)[None])[0], 0)
    level = torch.where(done > 0, least.gather(0, (done - 1).clamp(min=0)[None])[0], 0)
    level = level + (left - before) // (len(room) - done).clamp(min=1)
    shares = shares + torch.minimum(room, level)
    over = left - torch.minimum(room, level).sum()
    best = weight.sort(descending=True, stable=True).indices
    more = (room > level)[best]
    more &= more.cumsum(0) <= over
    return shares + torch.zeros_like(shares).index_put_((best,), more.long())
