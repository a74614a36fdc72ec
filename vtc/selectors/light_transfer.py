"""LightTransfer: decoder layers that attend to both ends of the prompt only need no entries in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..core.eviction import CacheContext, CacheSelector, protect
from ..core.layer_budgets import LazyBudgets
from ..errors import ConfigError
from ..registry import register_selector

__all__ = ["LightTransferSelector"]


@register_selector
@dataclass(frozen=True)
class LightTransferSelector(CacheSelector):
    """Empty the caches of lazy layers: streaming attention there, all entries elsewhere.

    A layer's laziness is the share of the last query's attention, averaged over heads, that goes to the first `initial`
    and the latest `recent` entries. The laziest layers lose all entries of visual tokens, so many of them as the budget
    asks for; with ``scope="all"`` they keep the two ends.

    Differences from the paper, of which no code was found: layers are ranked once the prompt was read, not by a queue
    while it is; and nothing is trained. SimLayerKV empties every layer above a threshold instead, which depends on the
    model: `kvpress` has it.

    Parameters
    ----------
    scope, budgets
        As in `CacheSelector`; the budgets are those of "lazy" layers, to which `initial` and `recent` belong.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "LightTransfer: Your Long-Context LLM is Secretly a Hybrid Model with Effortless Adaptation", arXiv 2410.13846.
    """

    name: ClassVar[str] = "light-transfer"
    paper: ClassVar[str] = "LightTransfer, arXiv 2410.13846"
    cost: ClassVar[str] = "N^2 d"

    budgets: Any = "lazy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layer_budgets, LazyBudgets):
            raise ConfigError('light-transfer: budgets must be "lazy", or a mapping with that name and its options.')

    def score(self, ctx: CacheContext) -> Tensor:
        """(N,) place in the prompt, the initial entries first."""
        shares = self.layer_budgets
        initial = shares.initial if isinstance(shares, LazyBudgets) else 0
        return protect(ctx.places.float(), ctx.places < initial)
