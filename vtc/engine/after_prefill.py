"""After the prefill: stages at the cache choose, and entries leave the key-value caches.

The prompt was read with all its tokens, so its own outputs do not change; from the first decode step on, an evicted
entry is as if masked. A method that selects tokens of pictures empties all layers of the same tokens; a `CacheSelector`
is shown the entries of each layer (`vtc/engine/evict.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from vtc.core.eviction import CacheSelector
from vtc.core.packing import PackPlan
from vtc.core.sites import CacheAfterPrefill
from vtc.engine.before_decoder import require_whole_prompt
from vtc.engine.choose import choose
from vtc.engine.compression import Compression
from vtc.engine.decoding import after_step
from vtc.engine.entries import keys_and_values, replace_keys_and_values, require_evictable
from vtc.engine.evict import evict_by_layer
from vtc.engine.state import ForwardState

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
    if prompt is None and after_step(forward, evict=compression.enabled):
        forward.write_record(compression.owner, forward.shift)
    if not stages or prompt is None or prompt.decided(_SITE):
        return
    if forward.cache is None:  # the language model has made one
        parts = output if isinstance(output, tuple) else output.values()
        forward.cache = next((part for part in parts if isinstance(part, Cache)), None)
    require_evictable(forward.cache, stages[0])
    require_whole_prompt(forward, stages[0])
    if isinstance(stages[0].selector, CacheSelector):
        changed = evict_by_layer(compression, forward, stages[0], stages[0].selector)
    else:
        for stage in stages:
            for segment in prompt.segments:
                prompt.spend(stage.site, choose(stage, segment, structural=compression.plan.structural))
        prompt.decide(_SITE)
        changed = _evict_tokens(forward, prompt.keep_at(_SITE))
    if changed:
        forward.write_record(compression.owner, forward.shift)


def _evict_tokens(forward: ForwardState, keep: torch.Tensor) -> bool:
    """Remove the entries of the prompt's columns that `keep` (S, P) drops, the same in all layers; False: none left."""
    starts = [start for start, _ in forward.key_groups]
    stops = [*starts[1:], len(forward.cache.layers)]
    groups, complete = [], set(forward.complete)
    for (start, index), stop in zip(forward.key_groups, stops, strict=True):
        left = forward.keeping_of(index, keep)
        if torch.equal(left, index >= 0):  # nothing leaves, and padding stays where it is
            groups.append((start, index))
            continue
        plan = PackPlan.from_keep(left)
        groups.append((start, plan.take(index).masked_fill(~plan.mask, -1)))
        if bool(plan.mask.all()):
            complete.add(start)
        for layer in range(start, stop):
            keys, values = (_take(plan, entries) for entries in keys_and_values(forward.cache, layer))
            replace_keys_and_values(forward.cache, layer, keys, values)
    changed = any(new is not old for (_, new), (_, old) in zip(groups, forward.key_groups, strict=True))
    forward.replace_keys(groups, complete)
    return changed


def _take(plan: PackPlan, entries: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, H, P, d) of the kept tokens."""
    return plan.take(entries.transpose(1, 2)).transpose(1, 2).contiguous()
