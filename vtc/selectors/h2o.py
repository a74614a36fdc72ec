"""H2O: keep the cache entries that received most attention, for each head its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.cache_signals import AttentionSums
from ..core.eviction import CacheContext, CacheSelector, protect
from ..core.signals import Signal
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

    This is the form for the prefill: scores are of the prompt. Only entries of visual tokens leave, unless
    ``scope="all"``.

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

    recent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent is not None and (isinstance(self.recent, bool) or not isinstance(self.recent, int)):
            raise ConfigError(f"h2o: recent must be an integer or None, got {shown(self.recent)}.")
        if self.recent is not None and self.recent < 0:
            raise ConfigError(f"h2o: recent must be at least 0, got {self.recent}.")

    def score(self, ctx: CacheContext) -> Tensor:
        """(heads, N) attention received."""
        recent = self.recent
        if recent is None:
            recent = ctx.budget // 2 if ctx.scope == "all" else 0
        return protect(ctx[AttentionSums].float(), ctx.places >= ctx.length - recent)
