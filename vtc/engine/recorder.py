"""Attention recorder: queries, keys and values of chosen attention modules, while the model keeps its own attention.

Every attention module of transformers looks its implementation up by name for each call and hands it the queries and
keys after normalisation and rotation. The recorder wraps the entries of that table: for a module that is being recorded
it calls a function with the arguments, then the implementation that would have run. Nothing about the model's
configuration, masks or outputs changes, and no N x N matrix is made for a score that needs rows or column sums of it.

The table is shared by all models of a process, so the wrappers are in it only while a `Recorder` exists, and pass every
other module straight through. What is recorded belongs to the current thread or task.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["UNSEEN", "Recorder", "Recording", "masking", "record_once", "recording"]

Recording = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any, float, Mapping[str, Any]], None]
"""Called with query (B, H, Lq, d), key and value (B, Hkv, M, d), the mask, the scaling and the other arguments."""

UNSEEN = (
    "either its attention implementation was registered after compress(), which must then be called again, or it is "
    "compiled by itself; torch.compile the whole model, or its layers, instead"
)
"""Why a recorded module may have run without the recorder's knowledge, and what to do."""

_RECORDED: ContextVar[Mapping[nn.Module, Recording]] = ContextVar("vtc_recorded", default={})  # noqa: B039 # never mutated


_EXTRA_MASK: ContextVar[Callable[[nn.Module, torch.Tensor], torch.Tensor | None] | None] = ContextVar(
    "vtc_extra_mask", default=None
)


@contextmanager
def masking(extra: Callable[[nn.Module, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Add `extra(module, query)` to the mask of each attention module while entered, if it is not None."""
    token = _EXTRA_MASK.set(extra)
    try:
        yield
    finally:
        _EXTRA_MASK.reset(token)


@contextmanager
def recording(modules: Mapping[nn.Module, Recording]) -> Iterator[None]:
    """Record these attention modules while entered, besides those that are being recorded already."""
    token = _RECORDED.set({**_RECORDED.get(), **modules})
    try:
        yield
    finally:
        _RECORDED.reset(token)


def record_once(module: nn.Module, record: Recording) -> None:
    """Record the next call of an attention module, if it comes before the surrounding `recording` ends."""

    def record_and_stop(*args: Any) -> None:
        _RECORDED.set({known: each for known, each in _RECORDED.get().items() if known is not module})
        record(*args)

    _RECORDED.set({**_RECORDED.get(), module: record_and_stop})


class Recorder:
    """Registration of one engine: while any exists, the table of attention functions looks for recorded modules."""

    def __init__(self) -> None:
        # Callbacks on a dying object run newest first: `_LIVE` must have forgotten it before the table is looked at.
        weakref.finalize(self, _synchronise).atexit = False
        with _LOCK:
            _LIVE.add(self)
        _synchronise()

    def close(self) -> None:
        """End the registration; with the last one the table is as it was found."""
        with _LOCK:
            _LIVE.discard(self)
        _synchronise()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return Recorder()

    def __reduce__(self) -> Any:
        return Recorder, ()


_LOCK = threading.RLock()
_LIVE: weakref.WeakSet[Recorder] = weakref.WeakSet()
_FOUND: dict[str, Callable[..., Any] | None] = {}  # name -> the local override that was there before, None if none


def _synchronise() -> None:
    # A recorder may die, and call this, in the middle of this: every step leaves a state from which any call goes on.
    table = ALL_ATTENTION_FUNCTIONS
    with _LOCK:
        if _LIVE:
            for name in [key for key in table if not key.startswith("paged|")]:
                if name not in _FOUND:
                    _wrap(name, table[name])
            if "eager" not in _FOUND:
                _wrap("eager", _eager)
        while _FOUND and not _LIVE:
            name, found = _FOUND.popitem()
            if found is None:
                table._local_mapping.pop(name, None)
            else:
                table[name] = found


def _wrap(name: str, implementation: Callable[..., Any]) -> None:
    found, wrapper = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name), _recorded(implementation)
    _FOUND[name] = found
    ALL_ATTENTION_FUNCTIONS[name] = wrapper


def _recorded(implementation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implementation)
    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        extra = _EXTRA_MASK.get()
        if extra is not None and (added := extra(module, query)) is not None:
            given = args[0] if args else kwargs.get("attention_mask")
            mask = added if given is None else added + _additive(given, added)
            args, kwargs = args[1:], {**kwargs, "attention_mask": mask}
        record = _RECORDED.get().get(module)
        if record is not None:
            observe = _record_eagerly if torch.compiler.is_compiling() else _record
            observe(record, query, key, value, args[0] if args else kwargs.get("attention_mask"), kwargs)
        return implementation(module, query, key, value, *args, **kwargs)

    return attention


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Any mask of an attention function as what is added to logits."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min / 2)
    return mask.clamp(min=torch.finfo(like.dtype).min / 2)


@torch.no_grad()
def _record(
    record: Recording,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    kwargs: Mapping[str, Any],
) -> None:
    scaling = kwargs.get("scaling")
    record(query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs)


_record_eagerly = torch.compiler.disable(_record, reason="vtc records attention outside of compiled graphs")


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Eager attention is not in the table: each modelling file passes its own function as the default.
    for cls in type(module).__mro__:
        implementation = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if implementation is not None:
            return implementation(module, *args, **kwargs)
    raise RuntimeError(f"no eager_attention_forward beside {type(module).__module__}.{type(module).__qualname__}")
