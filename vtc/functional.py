"""`vtc.select`: every method as a function of tensors, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .budget import check_budget, check_seed, resolve_budget
from .core.context import VisualContext
from .core.eviction import CacheSelector, nothing_to_select
from .core.grids import Grid
from .core.observations import TokenGrids
from .core.regions import Region, given_regions
from .core.selection import Selection
from .core.selector import Selector
from .core.signals import SHARED, Signal
from .core.stage import Stage
from .errors import ConfigError, InputError
from .plain import integer, shown
from .registry import get_selector

__all__ = ["select"]


@torch.no_grad()
def select(
    method: str,
    *,
    keep_tokens: int | None = None,
    keep_ratio: float | None = None,
    features: Any = None,
    grid_thw: Any = None,
    signals: Mapping[type[Signal] | Signal, Any] | None = None,
    structural: int = 0,
    other_visuals: int = 0,
    seed: int = 0,
    **named: Any,
) -> Selection:
    """Run one method on the tensors of one image or video.

    Wherever a tensor is taken, so is a NumPy array or a nested list of numbers. Integers are read as float32.

    What a method does to layers and heads is the method's business: it is given the layers it is to use, and all heads.
    A method of several stages is run at its first.

    Parameters
    ----------
    method
        Method id, e.g. "divprune".
    keep_tokens, keep_ratio
        How many of the N tokens to keep, or which fraction: exactly one of the two.
    features
        (N, D) visual tokens as the language model would see them. Optional for methods that only score attention.
    grid_thw
        (t, h, w) of the tokens, or one such triple per view; default (1, 1, N).
    signals
        What the method requires, by the type of the signal: ``{ClsAttention: rows}``, or by the signal itself where
        the method requires several of one type. The class of each signal says what its tensor holds. What follows from
        `grid_thw` need not be given.
    structural
        How many newline tokens stay beside the N, for methods that count them in their budget.
    other_visuals
        How many other images and videos the prompt has, for methods that treat an image in company differently.
    seed
        Seed of the method's randomness, if it has any, in 0..2**63-1.
    **named
        Signals by their short names (``cls_attention=rows``), and the method's own options.

    Returns
    -------
    Selection
        ``.keep`` is (K,) long and ascending, on the device of the inputs.

    Raises
    ------
    UnsupportedMethodError
        There is no such method, or it works at the key-value caches of a model.
    ConfigError
        An option, a count or the budget is invalid, or an input that the method needs is missing.
    InputError
        The inputs disagree about N, have the wrong shape, are not finite, or are no real numbers: booleans (masks),
        complex, quantised or sparse tensors, tensors without values, and anything that is no tensor.
    """
    keep_ratio, keep_tokens = check_budget(keep_ratio, keep_tokens)
    seed = check_seed(seed)
    structural, other_visuals = _count("structural", structural), _count("other_visuals", other_visuals)
    given, selector = _split(method, {} if signals is None else signals, named)
    if isinstance(selector, CacheSelector):
        raise nothing_to_select(selector.name)
    features = None if features is None else _tensor("features", features)
    selector = selector.resolve(None, keep_ratio)
    stage = selector.stages()[0]
    views = _grids(grid_thw)
    modality = "video" if any(t > 1 for t, _, _ in views) else "image"
    values = _by_requirement(selector, stage, given)
    _check_given(selector, stage, modality, features, values)
    n = _count_tokens(features, values, views)
    tensors = ({} if features is None else {"features": features}) | {s.name: value for s, value in values.items()}
    if n and (empty := sorted(name for name, value in tensors.items() if not value.numel())):
        raise InputError(f"{', '.join(empty)}: empty; give values for {n} tokens.")
    devices = {name: value.device for name, value in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} {device}" for name, device in devices.items())
        raise InputError(f"The inputs are on different devices: {listed}; move them to one.")
    device = next(iter(devices.values()), torch.device("cpu"))
    grids = views or ((1, 1, n),)
    for signal in stage.requires:
        if signal.reads is TokenGrids and signal not in values:
            values[signal] = signal.compute(TokenGrids(grids, device, *_marked()))
    context = VisualContext(
        features=torch.empty(n, 0, device=device) if features is None else features,
        budget=resolve_budget(n, keep_ratio, keep_tokens),
        generator=torch.Generator().manual_seed(seed),
        grids=grids,
        modality=modality,
        site=stage.site,
        keep_ratio=keep_ratio,
        structural=structural,
        other_visuals=other_visuals,
        signals=values,
    )
    return selector.select(context.check())


def _marked() -> tuple[Region | None, bool]:
    """Return the region that is marked around this call, and whether there is one."""
    given = given_regions()
    if given is None:
        return None, False
    if len(given) != 1:
        raise InputError(f"one image is selected from, but vtc.regions was given {len(given)} regions.")
    return given[0], True


def _count(name: str, value: Any) -> int:
    found = integer(value)
    if found is None or not 0 <= found < 2**31:
        raise ConfigError(f"{name} must be an integer of at least 0, got {shown(value)}.")
    return found


def _tensor(name: str, value: Any, *, whole: bool = False) -> Tensor:
    """A tensor of real numbers in a type that all methods compute with; `whole` ones stay as they are."""
    found = _as_tensor(name, value)
    problem = None
    if found.layout != torch.strided or found.is_nested or found.is_quantized:
        problem = "a sparse, nested or quantised tensor; make it dense, or dequantise it"
    elif found.is_meta:
        problem = "a tensor on the meta device, which has no values"
    elif found.is_complex() or found.dtype == torch.bool:
        problem = f"{str(found.dtype).removeprefix('torch.')} values; give real numbers"
    if problem:
        raise InputError(f"{name} is {problem}.")
    if whole and not found.is_floating_point():
        return found.long()
    if found.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return found
    return found.float()


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) or _is_array(item) for item in value):
            return torch.stack([_as_tensor(name, item) for item in value])
        if _is_array(value):
            return torch.tensor(value.copy())  # a copy: torch warns of arrays that are read-only, and refuses reversed
        if isinstance(value, (list, tuple)):
            return torch.tensor(value)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as error:
        raise InputError(f"{name} cannot be made a tensor of numbers: {error}.") from error
    raise InputError(f"{name} must be a tensor, an array or a nested list of numbers, got {shown(value)}.")


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array_interface__") and getattr(value, "ndim", 0) > 0 and hasattr(value, "copy")


def _split(
    method: str, signals: Mapping[type[Signal] | Signal, Any], named: Mapping[str, Any]
) -> tuple[dict[type[Signal] | Signal, Tensor], Selector]:
    """Signals as they were given, and the method with what is left of `named` as its options."""
    shared = {kind.name: kind for kind in SHARED}
    default = get_selector(method)
    options = default.options()
    names = {*shared, *(signal.name for signal in default.stages()[0].requires)}
    tensors = {
        name
        for name, value in named.items()
        if name not in options and (name in names or isinstance(value, (Tensor, list, tuple)) or _is_array(value))
    }
    selector = get_selector(method, **{name: value for name, value in named.items() if name not in tensors})
    by_name = shared | {signal.name: type(signal) for signal in selector.stages()[0].requires}
    unknown = sorted(tensors - set(by_name))
    if unknown:
        raise ConfigError(
            f"{method} reads no signal and has no option {', '.join(unknown)}; signals by name: {', '.join(by_name)}; "
            f"options: {', '.join(options) or 'none'}."
        )
    found: dict[type[Signal] | Signal, Any] = {
        by_name[name]: named[name] for name in sorted(tensors) if named[name] is not None
    }
    if not isinstance(signals, Mapping):
        raise ConfigError(f"signals maps types of signals to tensors, got {shown(signals)}.")
    for key, value in signals.items():
        kind = key if isinstance(key, type) else type(key)
        if not issubclass(kind, Signal) or getattr(kind, "__abstractmethods__", None):
            raise ConfigError(f"signals maps types of signals to tensors, got the key {shown(key)}.")
        found[key] = value
    return {key: _tensor(key.name, value, whole=key.reads is TokenGrids) for key, value in found.items()}, selector


def _by_requirement(
    selector: Selector, stage: Stage, given: Mapping[type[Signal] | Signal, Tensor]
) -> dict[Signal, Tensor]:
    """Assign the tensors to the required signals; those of a type that is not required stay beside them."""
    values: dict[Signal, Tensor] = {}
    for key, value in given.items():
        kind = key if isinstance(key, type) else type(key)
        required = [signal for signal in stage.requires if type(signal) is kind]
        if len(required) > 1 and key not in required:
            raise ConfigError(f"{selector.name} needs several signals {kind.name}; give each by itself: {required}.")
        signal = key() if isinstance(key, type) else key
        values[required[0] if len(required) == 1 else signal] = value
    return values


def _check_given(
    selector: Selector, stage: Stage, modality: str, features: Tensor | None, values: Mapping[Signal, Tensor]
) -> None:
    present = [*([] if features is None else ["features"]), *(signal.name for signal in values)]
    missing = ["features"] if selector.reads_features and features is None else []
    missing += sorted(
        signal.name
        for signal in stage.requires
        if signal.reads is not TokenGrids and signal.wanted_of(modality) and signal not in values
    )
    if missing:
        raise ConfigError(f"{selector.name} needs {', '.join(missing)}; got {', '.join(present) or 'no tensors'}.")


def _grids(grid_thw: Any) -> tuple[Grid, ...]:
    """Views as triples; empty if none were given."""
    if grid_thw is None:
        return ()
    try:
        views = _tensor("grid_thw", grid_thw, whole=True)
    except InputError as error:
        raise InputError(f"grid_thw must be (t, h, w) or one such triple per view: {error}") from error
    if views.ndim not in (1, 2) or not views.numel() or views.shape[-1] != 3 or views.is_floating_point():
        raise InputError(f"grid_thw must be (t, h, w) of integers, or one triple per view, got {shown(grid_thw)}.")
    found = tuple((t, h, w) for t, h, w in views.reshape(-1, 3).tolist())
    if min(map(min, found)) < 1 or sum(t * h * w for t, h, w in found) >= 2**31:
        raise InputError(f"grid_thw must be of positive integers, and of 2**31 tokens at most, got {shown(grid_thw)}.")
    return found


def _count_tokens(features: Tensor | None, values: Mapping[Signal, Tensor], views: tuple[Grid, ...]) -> int:
    """N, which every input that has a token axis must agree on."""
    if features is not None and features.ndim != 2:
        raise InputError(f"features must have 2 axes, (N, D), got the shape {tuple(features.shape)}.")
    counts = {} if features is None else {"features": features.shape[0]}
    counts |= {signal.name: count for signal, value in values.items() if (count := signal.count(value)) is not None}
    if views:
        counts["grid_thw"] = sum(t * h * w for t, h, w in views)
    if not counts:
        raise ConfigError(
            "The number of tokens is unknown: give features, grid_thw or a tensor with one entry per token."
        )
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"The inputs disagree about the number of tokens: {listed}.")
    return next(iter(counts.values()))
