"""A transformers cache that holds fewer tokens than the prompt had, and knows it.

transformers asks a cache two different questions through two different methods: how far the *conversation* has come
(`get_seq_length`, from which positions and the slice of unseen tokens follow) and how many keys are *stored*
(`get_query_offset` and `get_mask_sizes`, from which masks follow). After compression the answers differ, so the class
of the cache object is switched in place to one that tells them apart. The object stays the one the user holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from vtc.errors import StateError, UnsupportedMethodError

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls a cache where it passes one on: `past_key_values` until 5.23, `cache` since."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among a call's arguments, by the new or the old name; None without one."""
    cache = arguments.get(CACHE)
    return arguments.get("past_key_values") if cache is None else cache


class Owner:
    """The engine that filled a cache, as the cache knows it: `live` while it is installed."""

    def __init__(self) -> None:
        self.live = True


@dataclass
class CacheRecord:
    """Record of what was removed from one cache.

    Attributes
    ----------
    logical : int
        Tokens seen so far as the user counts them, dropped ones included.
    groups : list of (start_layer, source_index)
        Decoder layers from `start_layer` on (until the next group) store P keys, of which `source_index` (B, P) says
        where each stands in the uncompressed conversation, -1 for padding. Ascending in `start_layer`, the first is 0.
        Behind a method that chooses per layer or head, those of a group are padded alike but hold other tokens, and
        `source_index` is that of the first layer and head.
    shift : LongTensor (B,) or None
        With compact positions: how far each row's text positions moved down.
    complete : set of int
        Starts of groups that are known to have no padding.
    decoding : DecodingCaches or None
        What a method has to know that evicts while decoding.
    memories : list of PictureMemory
        What methods that update hidden states remember of the pictures of the conversation.
    owner : Owner
        Whoever masks this cache's padding.
    """

    logical: int = 0
    groups: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    shift: torch.Tensor | None = None
    complete: set[int] = field(default_factory=set)
    decoding: Any = None
    memories: list[Any] = field(default_factory=list)
    owner: Owner = field(default_factory=Owner)

    def keys_of(self, layer: int) -> torch.Tensor:
        """Return the source index (B, P) of the keys that `layer` stores."""
        return next(keys for start, keys in reversed(self.groups) if start <= layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheRecord:
        # A copied cache depends on the engine that filled it; a copied model has an engine of its own.
        groups, shift = deepcopy(self.groups, memo), deepcopy(self.shift, memo)
        complete, decoding = set(self.complete), deepcopy(self.decoding, memo)
        memories = list(self.memories)  # themselves never written to
        return replace(self, groups=groups, shift=shift, complete=complete, decoding=decoding, memories=memories)

    def map(self, rows: Any) -> None:
        """Apply `rows`, a function of a tensor with the batch first, to everything that has a batch dimension."""
        self.groups = [(start, rows(keys)) for start, keys in self.groups]
        if self.shift is not None:
            self.shift = rows(self.shift)
        if self.decoding is not None:
            self.decoding = self.decoding.map(rows)
        self.memories = [memory.map(rows) for memory in self.memories]


class CompactedCache:
    """Mixin over any transformers `Cache` class; see the module's docstring."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        record = record_of(self)
        return super().get_seq_length(layer_idx) if record is None else record.logical  # type: ignore[misc]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        record = record_of(self)
        if record is not None and not record.owner.live:
            raise StateError(
                "this cache was filled while the model was compressed and cannot be continued after restore(); "
                "start with a new cache, or use vtc.disabled(model) to pause compression"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        record = record_of(self)
        if record is not None and record.decoding is not None:
            raise UnsupportedMethodError(
                f"{record.decoding.method.name} at 'cache:decoding' has evicted entries for tokens that are now to be "
                "taken back, as assisted decoding and prompt lookup do; use at='cache', or decode without a draft"
            )
        if record is not None and tokens_to_remove > 0:
            # Older releases also read a positive number as the length to keep, which here is the logical one.
            tokens_to_remove = min(0, tokens_to_remove - record.logical)
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if record is not None and tokens_to_remove < 0:
            record.logical += tokens_to_remove
            record.groups = [(start, keys[:, :tokens_to_remove]) for start, keys in record.groups]
            record.memories = [memory for memory in record.memories if memory.start < record.logical]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        _map_record(self, lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        _map_record(self, lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        _map_record(self, lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.__dict__.pop("_vtc_record", None)


def record_of(cache: Any) -> CacheRecord | None:
    """Return the record of a compacted cache, None for any other cache and for no cache."""
    return None if cache is None else cache.__dict__.get("_vtc_record")


def compacted(cache: Cache) -> CacheRecord:
    """Switch `cache` to its compacted class (once) and return its record, a new one if it had none."""
    cls = type(cache)
    if not isinstance(cache, CompactedCache):
        if cls not in _CLASSES:
            _CLASSES[cls] = type(f"Compacted{cls.__name__}", (CompactedCache, cls), {"__module__": __name__})
        cache.__class__ = _CLASSES[cls]
    return cache.__dict__.setdefault("_vtc_record", CacheRecord())


_CLASSES: dict[type, type] = {}


def _map_record(cache: Any, rows: Any) -> None:
    record = record_of(cache)
    if record is not None:
        record.map(rows)
