"""Entries of caches as methods at the cache are shown them, made from the tensors of one attention layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtc.core.eviction import CacheContext, CacheSelector
from vtc.core.observations import DecoderAttention, DecoderCall
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


def called(raw: DecoderAttention, weight: Tensor) -> DecoderCall:
    """The call of an attention module that computes these queries, keys and values, all at position 0.

    `weight` (D, H * d) is that of its output projection.
    """
    states = [x.transpose(1, 2).flatten(2) for x in (raw.queries, raw.keys)]
    width = states[0].shape[-1]
    module = nn.Module()
    module.q_proj = lambda hidden: hidden[..., :width]
    module.k_proj = lambda hidden: hidden[..., width:]
    module.o_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.o_proj.weight.data = weight
    frequencies = 10.0 ** -torch.arange(raw.keys.shape[-1] // 2).repeat(2)

    def rotary(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] * frequencies
        return angles.cos().to(x), angles.sin().to(x)

    start = torch.zeros(*raw.valid.shape, dtype=torch.long)
    tables = rotary(raw.keys, start)
    return DecoderCall(None, module, torch.cat(states, dim=-1), raw.keys, raw.values, tables, rotary, None, raw.valid)


def context(
    method: CacheSelector, n: int, budget: int, signals: dict[Any, Tensor] | None = None, **facts: Any
) -> CacheContext:
    """All `n` entries of a prompt in one layer, with the signals of the method."""
    facts = {"layer": 0, "layers": 1, "heads": 2, "visual": torch.zeros(n, dtype=torch.bool), **facts}
    return CacheContext(budget=budget, places=torch.arange(n), length=n, scope="all", signals=signals or {}, **facts)


def read(method: CacheSelector, raw: DecoderAttention, budget: int, **facts: Any) -> CacheContext:
    """The same, with the signals computed from what was observed of a layer."""
    heads, width = raw.queries.shape[1], raw.values.shape[3]
    call = called(raw, torch.randn(16, heads * width, generator=torch.Generator().manual_seed(0)))
    signals = {
        signal: signal.present(signal.compute(call if signal.reads is DecoderCall else raw)[0])
        for signal in method.stages()[0].requires
    }
    return context(method, raw.queries.shape[2], budget, signals, heads=raw.keys.shape[1], **facts)
