"""Keys and values in the layers of a cache, whatever form they are stored in: as tensors, quantized, or offloaded.

A quantized layer is dequantised, what stays of it is quantised again. That adds nothing but rounding of floating point
where each group of values that share a scale lies within one entry, which takes a group size that divides the width of
a head (64, the default, mostly does) and the default axes of quanto, or both axes 1 of hqq; and nothing at all in fp8,
whose scale the layer keeps. Elsewhere groups change their members, and each value is rounded once more, by at most half
a step, as transformers itself does each time the unquantized rest of such a layer is full. An offloaded layer is read
and written where it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer

from vtc.core.sites import CacheWhileDecoding
from vtc.engine.plan import PlannedStage
from vtc.engine.preallocated import PreallocatedLayer
from vtc.errors import UnsupportedMethodError

__all__ = ["keys_and_values", "replace_keys_and_values", "require_evictable"]

_FP8 = tuple(getattr(cache_utils, name) for name in ("Fp8QuantizedLayer",) if hasattr(cache_utils, name))  # since 5.24
_PLAIN = (DynamicLayer, PreallocatedLayer)


def require_evictable(cache: Any, stage: PlannedStage) -> None:
    """Raise UnsupportedMethodError where entries are to leave a cache that there is not, or that cannot lose any."""
    method, where = stage.selector.name, repr(str(stage.site))
    if cache is None:
        raise UnsupportedMethodError(f"{method} at {where} needs a key-value cache; call the model with use_cache=True")
    other = [layer for layer in cache.layers if type(layer) not in _PLAIN]
    if kinds := sorted({type(layer).__name__ for layer in other if not _quantized(layer)}):
        raise UnsupportedMethodError(
            f"{method} at {where} removes entries of a dynamic cache, but this one has layers of type "
            f"{', '.join(kinds)}; use cache_implementation='dynamic', or at='decoder'"
        )
    offloaded = getattr(cache, "offloading", False)
    if isinstance(stage.site, CacheWhileDecoding) and (other or offloaded):
        found, cost = (
            ("is offloaded", "carried to the CPU whole")
            if offloaded
            else ("is quantized", "dequantised and quantised whole")
        )
        raise UnsupportedMethodError(
            f"{method} at {where} replaces single entries at every step, but this cache {found}: each layer would be "
            f"{cost} for it; use at='cache', whose entries leave once, or cache_implementation='dynamic'"
        )


def keys_and_values(cache: Cache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values (B, H, P, d) that a layer of a cache holds, on the device where they lie."""
    own = cache.layers[layer]
    if not _quantized(own):
        _settle(cache, own)
        return own.keys, own.values
    keys, values = own._dequantize(own._quantized_keys), own._dequantize(own._quantized_values)
    if hasattr(own, "_apply_pending_reorder"):  # of beams
        keys, values = own._apply_pending_reorder(keys, values)
    if own.keys.numel():  # the latest, which are not quantized yet
        keys, values = torch.cat([keys, own.keys], dim=2), torch.cat([values, own.values], dim=2)
    return keys, values


def replace_keys_and_values(cache: Cache, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let a layer of a cache hold these keys and values (B, H, P, d) instead, in its own form.

    Raises
    ------
    UnsupportedMethodError
        They cannot be quantised in groups of the layer's size.
    """
    own = cache.layers[layer]
    if not _quantized(own):
        own.keys, own.values = keys, values
        return
    if isinstance(own, _FP8):
        given: list[dict[str, Any]] = [{"scale": own._quantized_keys[1]}, {"scale": own._quantized_values[1]}]
    else:
        given = [{"axis": own.axis_key}, {"axis": own.axis_value}]
    try:
        own._quantized_keys, own._quantized_values = (
            own._quantize(entries.contiguous(), **options)
            for entries, options in zip((keys, values), given, strict=True)
        )
    except (AssertionError, ValueError) as error:  # of the packages that quantise
        size = getattr(own, "q_group_size", None)
        raise UnsupportedMethodError(
            f"{tuple(keys.shape)} keys are left in layer {layer} of a quantized cache, which cannot be quantised in "
            f"groups of {size} values: {error}; give the cache a q_group_size that divides the width of a head, "
            f"{keys.shape[3]}"
        ) from error
    own.keys, own.values = own.keys.new_empty(0), own.values.new_empty(0)
    own.cumulative_length = keys.shape[2]
    if hasattr(own, "_pending_beam_idx"):
        own._pending_beam_idx = None


def _quantized(layer: Any) -> bool:
    return isinstance(layer, (QuantizedLayer, *_FP8))


def _settle(cache: Cache, layer: Any) -> None:
    """Wait until the entries of an offloaded cache have arrived on the device they are on the way to."""
    if getattr(cache, "offloading", False) and layer.device.type != "cpu":
        torch.cuda.synchronize(layer.device)  # all streams, that of prefetching among them
