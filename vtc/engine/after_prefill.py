"""After the prefill: stages at the cache choose, and the entries of the other visual tokens leave the key-value caches.

The prompt was read with all its tokens, so its own outputs do not change; from the first decode step on, an evicted
entry is as if masked. Caches of all layers lose the same tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from vtc.core.packing import PackPlan
from vtc.core.sites import CacheAfterPrefill
from vtc.engine.before_decoder import require_whole_prompt
from vtc.engine.choose import choose
from vtc.engine.compression import Compression
from vtc.engine.state import ForwardState
from vtc.errors import UnsupportedMethodError

__all__ = ["after_prefill"]

_SITE = CacheAfterPrefill()


def after_prefill(compression: Compression, forward: ForwardState, output: Any) -> None:
    """Let the stages at the cache choose, once per prompt, and shorten the caches that this pass has filled.

    Raises
    ------
    UnsupportedMethodError
        There is no cache, or one of a kind whose entries cannot be removed; or the prompt came in pieces.
    """
    stages, prompt = compression.plan.after_prefill, forward.prompt
    if not stages or prompt is None or prompt.decided(_SITE):
        return
    method = stages[0].selector.name
    if forward.cache is None:  # the language model has made one
        parts = output if isinstance(output, tuple) else output.values()
        forward.cache = next((part for part in parts if isinstance(part, Cache)), None)
    _check_cache(forward.cache, method)
    for stage in stages:
        require_whole_prompt(forward, stage)
        for segment in prompt.segments:
            prompt.spend(stage.site, choose(stage, segment, structural=compression.plan.structural))
    prompt.decide(_SITE)
    keep = prompt.keep_at(_SITE)
    starts = [start for start, _ in forward.key_groups]
    stops = [*starts[1:], len(forward.cache.layers)]
    groups = []
    for (start, index), stop in zip(forward.key_groups, stops, strict=True):
        left = forward.keeping_of(index, keep)
        if torch.equal(left, index >= 0):  # nothing leaves, and padding stays where it is
            groups.append((start, index))
            continue
        plan = PackPlan.from_keep(left)
        groups.append((start, plan.take(index).masked_fill(~plan.mask, -1)))
        for layer in forward.cache.layers[start:stop]:
            layer.keys, layer.values = (_take(plan, entries) for entries in (layer.keys, layer.values))
    if all(new is old for (_, new), (_, old) in zip(groups, forward.key_groups, strict=True)):
        return
    forward.key_groups = groups
    forward.write_record(compression.owner, forward.shift)


def _take(plan: PackPlan, entries: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, H, P, d) of the kept tokens."""
    return plan.take(entries.transpose(1, 2)).transpose(1, 2).contiguous()


def _check_cache(cache: Any, method: str) -> None:
    if cache is None:
        raise UnsupportedMethodError(f"{method} at 'cache' needs a key-value cache; call the model with use_cache=True")
    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if kinds or getattr(cache, "offloading", False):
        found = f"layers of type {', '.join(kinds)}" if kinds else "offloaded layers"
        raise UnsupportedMethodError(
            f"{method} at 'cache' removes entries of a dynamic cache, but this one has {found}; use "
            "cache_implementation='dynamic', or at='decoder'"
        )
