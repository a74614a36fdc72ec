"""What the transcriptions of methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vtc.core.context import VisualContext
from vtc.core.signals import ClsAttention, ReceivedAttention

__all__ = ["Choice", "Transcription", "as_choice", "best_of", "feature_attention"]

Choice = tuple[Tensor, Tensor | None]
"""Kept tokens (K,), and their merged features (K, D)."""

Transcription = Callable[[Any, VisualContext], Choice]


def as_choice(picks: Tensor) -> Choice:
    """Picks in any order, and nothing merged."""
    return picks.sort().values, None


def best_of(scores: Tensor, k: int) -> Tensor:
    """(k,): the best first, the lower index winning ties."""
    return scores.sort(descending=True, stable=True).indices[:k]


def feature_attention(selector: Any, ctx: VisualContext) -> Tensor:
    """(N,): what the feature layer attends to, averaged over heads."""
    source = ReceivedAttention if selector.score_source == "received" else ClsAttention
    return ctx[source][-1].float().mean(dim=0)
