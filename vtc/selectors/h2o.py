"""H2O: keep the cache entries that received most attention, for each head its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.cache_signals import AttentionSums
from ..core.eviction import CacheContext, CacheSelector, DecodingState, Leaving, protect
from ..core.signals import Signal
from ..core.sites import CacheAfterPrefill, CacheWhileDecoding, Site
from ..errors import ConfigError
from ..plain import shown
from ..registry import register_selector

__all__ = ["H2oSelector"]


@register_selector
@dataclass(frozen=True)
class H2oSelector(CacheSelector):
    """Keep, per layer and key head, the most recent entries and those that all queries together attended to most.

    ``score_j = sum over all queries i of A[i, j]``, averaged over the query heads that share a key head. Because every
    query counts, early entries are seen by more of them and rank high.

    At ``at="cache:decoding"`` the attention of every further token is added to the scores, and for each one the entry
    with the lowest leaves. Only entries of visual tokens leave, unless ``scope="all"``.

    Parameters
    ----------
    scope, budgets
        As in `CacheSelector`.
    recent
        How many of the last tokens of the prompt stay before all others; None: half of the budget with ``scope="all"``,
        as in the paper, and 0 otherwise, because the text behind a picture stays in any case.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    cost: ClassVar[str] = "N^2 d"
    requires: ClassVar[tuple[Signal, ...]] = (AttentionSums(),)
    sites: ClassVar[tuple[type[Site], ...]] = (CacheAfterPrefill, CacheWhileDecoding)
    accumulates: ClassVar[bool] = True

    recent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent is not None and (isinstance(self.recent, bool) or not isinstance(self.recent, int)):
            raise ConfigError(f"h2o: recent must be an integer or None, got {shown(self.recent)}.")
        if self.recent is not None and self.recent < 0:
            raise ConfigError(f"h2o: recent must be at least 0, got {self.recent}.")

    def accumulated(self, ctx: CacheContext) -> Tensor:
        """(heads, N) attention received."""
        return ctx[AttentionSums].float()

    def leaving(self, state: DecodingState) -> Leaving:
        """Return as many of the lowest scores as there are entries more than after the prefill."""
        recent = state.kept // 2 if self.recent is None else min(self.recent, state.kept - 1)
        return Leaving(state.excess, None, recent)

    def score(self, ctx: CacheContext) -> Tensor:
        """(heads, N) attention received."""
        recent = self.recent
        if recent is None:
            recent = ctx.budget // 2 if ctx.scope == "all" else 0
        return protect(ctx[AttentionSums].float(), ctx.places >= ctx.length - recent)
