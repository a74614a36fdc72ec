"""SCOPE: tokens that cover what no other covers yet, the salient ones first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import kernels
from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.signals import PreProjector, Signal
from ..errors import ConfigError
from ..registry import register_selector
from .saliency import SOURCES, SaliencySelector
from .schedule import check_number

__all__ = ["ScopeSelector"]


@register_selector
@dataclass(frozen=True)
class ScopeSelector(SaliencySelector):
    """Keep the tokens that cover all others best, weighted by [CLS] attention.

    The coverage of a token is the cosine to the most similar token kept, at least 0, of the tower's features before the
    projector. In every step the token with the largest ``gain_j * a_j ** alpha`` is kept, where gain_j is by how much
    it raises the coverage of all tokens together, and a_j the attention that [CLS] gives it in the layer that makes the
    features, summed over heads.

    As released, but computed lazily (`vtc.kernels.coverage_greedy`): gains only shrink, so most need no update.

    Parameters
    ----------
    alpha
        How much attention counts; 0: coverage alone.
    combine
        "multiply"; or "add": ``gain_j + a_j ** alpha``.
    score_source
        "cls", or "received": the attention that a token receives from all others, for towers without a [CLS] token.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", arXiv 2510.24214.
    """

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "SCOPE, arXiv 2510.24214"
    cost: ClassVar[str] = "N^2 d"
    reads_features: ClassVar[bool] = False
    beside: ClassVar[tuple[Signal, ...]] = (PreProjector(),)

    alpha: float = 1.0
    combine: str = "multiply"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scope", "alpha", self.alpha, 0, 10)
        if self.combine not in ("multiply", "add"):
            raise ConfigError(f'scope: combine must be "multiply" or "add", got {self.combine!r}.')

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        weight = ctx[SOURCES[self.score_source]][-1].float().sum(dim=0) ** self.alpha
        picks = kernels.coverage_greedy(ctx[PreProjector], ctx.budget, weight, self.combine)
        return Selection.from_indices(ctx.n, picks)
