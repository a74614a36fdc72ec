"""Entries of caches as methods at the cache are shown them, made from the tensors of one attention layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.core.eviction import CacheContext, CacheSelector
from vtc.core.observations import DecoderAttention
from vtc.kernels import VisibilityMask


def observed(queries: Tensor, keys: Tensor, values: Tensor | None = None) -> DecoderAttention:
    """The attention of a layer to a prompt of text, (B, H, n, d), as the engine shows it."""
    batch, _, n, width = queries.shape
    places = torch.arange(n).expand(batch, -1)
    everything = torch.ones(batch, n, dtype=torch.bool)
    return DecoderAttention(
        queries,
        keys,
        keys if values is None else values,
        width**-0.5,
        VisibilityMask(places, places),
        n,
        everything,
        everything,
        ~everything,
        torch.full((batch,), n - 1),
    )


def context(
    method: CacheSelector, n: int, budget: int, signals: dict[Any, Tensor] | None = None, **facts: Any
) -> CacheContext:
    """All `n` entries of a prompt in one layer, with the signals of the method."""
    facts = {"layer": 0, "layers": 1, "heads": 2, "visual": torch.zeros(n, dtype=torch.bool), **facts}
    return CacheContext(budget=budget, places=torch.arange(n), length=n, scope="all", signals=signals or {}, **facts)


def read(method: CacheSelector, raw: DecoderAttention, budget: int, **facts: Any) -> CacheContext:
    """The same, with the signals computed from what was observed of a layer."""
    signals = {signal: signal.present(signal.compute(raw)[0]) for signal in method.stages()[0].requires}
    return context(method, raw.queries.shape[2], budget, signals, heads=raw.keys.shape[1], **facts)
