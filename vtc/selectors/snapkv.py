"""SnapKV: keep the cache entries that the end of the prompt attends to, for each head its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..core.cache_signals import WindowAttention
from ..core.eviction import CacheContext, CacheSelector
from ..core.layer_budgets import LayerBudgets, PyramidBudgets
from ..core.signals import Signal
from ..registry import register_selector

__all__ = ["SnapKvSelector"]


@register_selector
@dataclass(frozen=True)
class SnapKvSelector(CacheSelector):
    """Keep, per layer and key head, the entries that the last queries of the prompt attend to most.

    For entry ``j`` before the window of the last ``w`` tokens, ``score_j = pool(mean over the window of A[i, j])``,
    averaged over the query heads that share a key head; entries of the window stay first. Pooling along the prompt
    keeps neighbours together.

    Differences from the released code: heads that share keys are averaged (as kvpress does), where the released code
    keeps a copy of the cache per query head; only entries of visual tokens leave, unless ``scope="all"``; and with
    ``budgets="pyramid"`` this is PyramidKV.

    Parameters
    ----------
    scope, budgets
        As in `CacheSelector`.
    window
        w, how many of the last tokens of the prompt ask.
    kernel
        Odd length of the pooling window; 1: none.
    pooling
        "mean", or "max" over neighbours.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469, section 4.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    cost: ClassVar[str] = "N d"

    window: int = 32
    kernel: int = 5
    pooling: str = "mean"

    def __post_init__(self) -> None:
        self.reads()
        super().__post_init__()

    @property
    def layer_budgets(self) -> LayerBudgets:
        """How the layers share the budget; the window is no part of PyramidKV's line."""
        shares = super().layer_budgets
        if isinstance(shares, PyramidBudgets) and shares.window is None and self.scope == "all":
            return replace(shares, window=self.window)
        return shares

    def reads(self) -> tuple[Signal, ...]:
        """Return the pooled attention of the window."""
        return (WindowAttention(self.window, self.kernel, self.pooling),)

    def score(self, ctx: CacheContext) -> Tensor:
        """(heads, N) pooled attention."""
        return ctx[WindowAttention].float()
