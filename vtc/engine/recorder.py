"""Attention scores without eager attention.

Every attention module of transformers looks its kernel up by name for each call and hands it the queries and keys after
normalisation and rotation. The tap stands between: for a module that carries a tap it computes just the rows or sums
that were asked for, then calls the kernel that would have run. Nothing about the model's configuration, masks or
outputs changes, and no N x N matrix is made for a score that needs only rows or column sums of it.

The table of kernels is shared by all models of a process, so the wrappers are in it only while a tap exists, and pass
every module without a tap straight through.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtc.kernels import attention_received, attention_rows

Reader = Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor | None], torch.Tensor]


@dataclass(eq=False)
class AttentionTap:
    """What to record on one attention module while `active`.

    Attributes
    ----------
    cls_rows : bool
        Softmax rows of query 0, (B, H, M) per call.
    received : bool
        Attention received by every key, averaged over the queries, (B, H, M) per call.
    keys : bool
        Keys with heads concatenated, (B, M, H * d) per call.
    queries : LongTensor (B, R) or None
        Rows to record, as column indices among the current queries; needs `key_mask`.
    key_mask : BoolTensor (B, M) or None
        Keys that exist, past ones included.
    readers : mapping of name to function
        What else to record: functions of query, key, scaling and, in a tower, who may see whom.
    once : mapping of name to function
        The same until `stop`, for one pass.
    calls : list of the arguments of `observe`, or None
        Filled, if it is there, with what was observed: observing it again records the same.
    """

    cls_rows: bool = False
    received: bool = False
    keys: bool = False
    queries: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    readers: dict[str, Reader] = field(default_factory=dict)
    once: dict[str, Reader] = field(default_factory=dict)
    calls: list[tuple[Any, ...]] | None = None
    active: bool = False
    records: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, fields: Iterable[str]) -> AttentionTap:
        """A tap that records the named fields."""
        tap = cls()
        for name in fields:
            setattr(tap, name, True)
        return tap

    def start(self) -> None:
        """Begin to record."""
        self.records = []
        self.active = True

    def stop(self) -> list[dict[str, torch.Tensor]]:
        """End recording and hand over what was recorded, one entry per call of the kernel."""
        records, self.records, self.active, self.queries, self.key_mask = self.records, [], False, None, None
        self.once, self.calls = {}, None
        return records

    @torch.no_grad()
    def observe(
        self, query: torch.Tensor, key: torch.Tensor, mask: Any, scaling: float | None, kwargs: dict[str, Any]
    ) -> None:
        """Record from one call: `query` (B, H, Lq, d), `key` (B, Hkv, M, d), after rotation, and the kernel's mask."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.calls is not None:
            self.calls.append((query, key, mask, scaling, {"cu_seq_lens_q": kwargs.get("cu_seq_lens_q")}))
        # A flash kernel gets all images of a packed tower in one call; the other kernels get them one by one.
        bounds = kwargs.get("cu_seq_lens_q") if self.queries is None else None
        allowed = _allowed(mask) if bounds is None else None
        record: dict[str, torch.Tensor] = {}
        if self.cls_rows:
            if bounds is None:
                first, sight = query[:, :, :1], None if allowed is None else allowed[:, :, :1]
            else:
                first, sight = query[0, :, bounds[:-1].long()].transpose(0, 1)[:, :, None], None
            record["cls_attention"] = attention_rows(first, key, scaling, sight, cu_seqlens=bounds)[:, :, 0]
        if self.received:
            record["received_attention"] = attention_received(query, key, scaling, allowed, cu_seqlens=bounds)
        if self.keys:
            record["keys"] = key.transpose(1, 2).flatten(2)
        for name, read in {**self.readers, **self.once}.items():
            if bounds is None:
                record[name] = read(query, key, scaling, allowed)
            else:
                lengths = bounds.diff().tolist()
                parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), strict=True)
                record[name] = torch.cat([read(q, k, scaling, None) for q, k in parts], dim=-1)
        if self.queries is not None:
            if self.key_mask is None:
                raise RuntimeError("a tap with queries needs key_mask")
            index = self.queries[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
            mask = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
            known = self.key_mask.shape[1]  # a static cache has room for more keys than exist yet
            mask[:, :known] = self.key_mask
            past = known - query.shape[2]
            causal = torch.arange(key.shape[2], device=key.device) <= (self.queries + past)[..., None]
            allowed = mask[:, None, :] & causal
            record["text_attention"] = attention_rows(query.gather(2, index), key, scaling, allowed[:, None])
        self.records.append(record)

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionTap:
        return _live(AttentionTap(self.cls_rows, self.received, self.keys, readers=dict(self.readers)))


def _allowed(mask: Any) -> torch.Tensor | None:
    """Who may see whom, (B, 1, Lq or 1, M), from any mask that a tower's kernel takes."""
    if mask is None or not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, None, None].bool()
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def attach(module: nn.Module, tap: AttentionTap) -> None:
    """Put `tap` on an attention module and make sure that the kernels look for taps."""
    module._vtc_tap = _live(tap)  # type: ignore[assignment]


def detach(modules: Iterable[nn.Module]) -> None:
    """Take the taps off again; with the last one the table of kernels is as it was found."""
    for module in modules:
        tap = module.__dict__.pop("_vtc_tap", None)
        if tap is not None:
            with _LOCK:
                _LIVE.discard(tap)
    _synchronise()


_LOCK = threading.RLock()
_LIVE: weakref.WeakSet[AttentionTap] = weakref.WeakSet()
_FOUND: dict[str, Callable[..., Any] | None] = {}  # name -> the local override that was there before, None if none


def _live(tap: AttentionTap) -> AttentionTap:
    # Callbacks on a dying object run newest first: `_LIVE` must have forgotten it before the table is looked at.
    weakref.finalize(tap, _synchronise).atexit = False
    with _LOCK:
        _LIVE.add(tap)
    _synchronise()
    return tap


def _synchronise() -> None:
    # A tap may die, and call this, in the middle of this: every step leaves a state from which any call goes on.
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


def _wrap(name: str, kernel: Callable[..., Any]) -> None:
    found, wrapper = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name), _tapped(kernel)
    _FOUND[name] = found
    ALL_ATTENTION_FUNCTIONS[name] = wrapper


def _tapped(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        tap = getattr(module, "_vtc_tap", None)
        if tap is not None and tap.active:
            mask = args[0] if args else kwargs.get("attention_mask")
            tap.observe(query, key, mask, kwargs.get("scaling"), kwargs)
        return kernel(module, query, key, value, *args, **kwargs)

    return attention


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Eager attention is not in the table: each modelling file passes its own function as the default.
    for cls in type(module).__mro__:
        kernel = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if kernel is not None:
            return kernel(module, *args, **kwargs)
    raise RuntimeError(f"no eager_attention_forward beside {type(module).__module__}.{type(module).__qualname__}")
