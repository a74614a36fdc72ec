"""VisPruner: tokens that [CLS] looks at, and of the others those without a close relative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.signals import PreProjector, Signal
from ..kernels import cosines
from ..kernels.cosines import with_inverse_norms
from ..kernels.dispatch import queues
from ..registry import register_selector
from .saliency import SaliencySelector
from .schedule import check_fraction

__all__ = ["VisPrunerSelector"]

_STEP = 8  # tokens dropped per round
_NEAR = 64  # relatives listed per token
_FIRST = 8  # of these, looked at before the others
_BLOCK = 512  # rows of the similarity matrix computed at a time
_ROUNDING = 1e-6  # most that two float32 products of the same rows differ by


@register_selector
@dataclass(frozen=True)
class VisPrunerSelector(SaliencySelector):
    """Keep important tokens, then thin out the others until the budget is met, those with a close relative first.

    Important are the ``int(K * important_ratio)`` tokens with the most [CLS] attention in the layer that makes the
    features, averaged over heads. The others are listed by descending attention. In every round each token at an even
    place of the list is compared with all at odd places; the 8 with the largest cosine to any of these are dropped (as
    many as there are too many, if that is less); those of the even places that are left, by descending cosine, and then
    those of the odd places make the next list. Cosines are of the tower's features before the projector.

    As released, but that lists of odd length work too, where the released code stops with an error: the even places
    then hold one token more. Ties go to the token named first.

    Parameters
    ----------
    important_ratio
        Fraction of the budget for important tokens.
    score_source
        "cls", or "received": the attention that a token receives from all others, for towers without a [CLS] token.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", arXiv 2412.01818v2.
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "VisPruner, arXiv 2412.01818"
    cost: ClassVar[str] = "N^2 d"
    reads_features: ClassVar[bool] = False
    beside: ClassVar[tuple[Signal, ...]] = (PreProjector(),)

    important_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("vispruner", "important_ratio", self.important_ratio)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        ranked = self.saliency(ctx).sort(descending=True, stable=True).indices
        important = int(ctx.budget * self.important_ratio)
        if important == ctx.budget:
            return Selection.from_indices(ctx.n, ranked[:important])
        spread = thin_out(ctx[PreProjector], ranked[important:], ctx.budget - important)
        return Selection.from_indices(ctx.n, torch.cat([ranked[:important], spread]))


def thin_out(x: Tensor, listed: Tensor, count: int) -> Tensor:
    """Return `count`, at least 1, of the tokens `listed` (R,), as the last list has them; `x` (N, D) is compared."""
    while len(listed) > count:
        relatives = _Relatives(x.index_select(0, listed))
        order = torch.arange(len(listed), device=listed.device)
        enough = max(count, len(listed) // 2)  # with half of them gone, new lists of relatives pay
        while len(order) > enough:
            even, odd = order[::2], order[1::2]
            ranked = relatives.nearest(even, odd).sort(descending=True, stable=True).indices
            order = torch.cat([even[ranked[min(_STEP, len(order) - count) :]], odd])
        listed = listed[order]
    return listed


class _Relatives:
    """The closest relatives of every token, in O(N) memory.

    Half of the tokens are at odd places, so nearly always one of a token's `_NEAR` closest is; only for the others the
    products are computed again. Which these are, a GPU would be waited for; there the whole matrix is kept instead,
    where it is small.
    """

    def __init__(self, x: Tensor) -> None:
        self._x, inverse = with_inverse_norms(x)
        self._unit = self._x.float() * inverse[:, None]
        self._table = self._unit @ self._unit.T if queues(x) and 4 * len(x) ** 2 <= cosines.WORKSPACE else None
        if self._table is not None:
            return
        near = min(_NEAR, len(x) - 1)
        found = []
        for start in range(0, len(x), _BLOCK):
            cosine = self._unit[start : start + _BLOCK] @ self._unit.T
            cosine.diagonal(start).fill_(-torch.inf)
            found.append(cosine.topk(near, dim=1))
        # The last column is for the relative that was found for a token which none of its closest was.
        pad = torch.nn.functional.pad
        self._index = pad(torch.cat([block.indices for block in found]), (0, 1), value=-1)
        self._value = pad(torch.cat([block.values for block in found]).double(), (0, 1))
        self._known = torch.zeros_like(self._index, dtype=torch.bool)  # whether the value was computed in float64

    def nearest(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Return (M,) float64 the largest cosine of each of `tokens` to any of `others`, -inf if there are none.

        Where the order of two would be rounding, both are computed in float64.
        """
        if not len(others):
            return self._unit.new_full((len(tokens),), -torch.inf, dtype=torch.float64)
        if self._table is not None:
            best, place = self._table.index_select(0, tokens).index_select(1, others).max(dim=1)
            best, partner = best.double(), others[place]
            value, order = best.sort()
            tied = torch.empty_like(best, dtype=torch.bool).index_copy_(0, order, _near_another(value))
            return torch.where(tied, self._exact(tokens, partner), best)
        among = torch.zeros(len(self._unit), dtype=torch.bool, device=others.device)
        among[others] = True
        place = _first(among[self._index[:, :-1][:, :_FIRST][tokens]])
        later = (place < 0).nonzero()[:, 0]
        place[later] = _first(among[self._index[:, :-1][tokens[later]]])
        missed = tokens[place < 0]
        if len(missed):
            found, at = (self._unit[missed] @ self._unit.T)[:, others].max(dim=1)
            self._value[missed, -1], self._index[missed, -1] = found.double(), others[at]
            self._known[missed, -1] = False
        value, order = self._value[tokens, place].sort()
        tied = order[_near_another(value)]
        tied = tied[~self._known[tokens[tied], place[tied]]]
        pairs = tokens[tied], place[tied]
        self._value[pairs] = self._exact(pairs[0], self._index[pairs])
        self._known[pairs] = True
        return self._value[tokens, place]

    def _exact(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Return (M,) float64 the cosines of pairs; those of copies are equal."""
        pair = self._x[tokens].double(), self._x[others].double()
        return torch.cosine_similarity(*pair, dim=1, eps=1e-12).round(decimals=9)


def _first(hit: Tensor) -> Tensor:
    """(M,) long: the first True of every row (M, P), -1 without one."""
    place = hit.int().argmax(dim=1)
    return torch.where(hit.gather(1, place[:, None])[:, 0], place, -1)


def _near_another(ordered: Tensor) -> Tensor:
    """(M,) bool: which of ascending values (M,) have a neighbour that rounding may put before or behind them."""
    close = ordered.diff() < _ROUNDING
    return torch.nn.functional.pad(close, (1, 0)) | torch.nn.functional.pad(close, (0, 1))
