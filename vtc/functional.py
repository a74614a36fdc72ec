"""`vtc.select`: every method as a function of tensors, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .budget import resolve_budget
from .core.context import VisualContext
from .core.grids import Grid
from .core.observations import TokenGrids
from .core.selection import Selection
from .core.selector import Selector
from .core.signals import SHARED, Signal
from .core.stage import Stage
from .errors import ConfigError, InputError
from .registry import get_selector

__all__ = ["select"]


@torch.no_grad()
def select(
    method: str,
    *,
    keep_tokens: int | None = None,
    keep_ratio: float | None = None,
    features: Tensor | None = None,
    grid_thw: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    signals: Mapping[type[Signal] | Signal, Tensor] | None = None,
    structural: int = 0,
    other_visuals: int = 0,
    seed: int = 0,
    **named: Any,
) -> Selection:
    """Run one method on the tensors of one image or video.

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
        Seed of the method's randomness, if it has any.
    **named
        Signals by their short names (``cls_attention=rows``), and the method's own options.

    Returns
    -------
    Selection
        ``.keep`` is (K,) long and ascending, on the device of the inputs.

    Raises
    ------
    UnsupportedMethodError
        There is no such method.
    ConfigError
        An option or the budget is invalid, or an input that the method needs is missing.
    InputError
        The inputs disagree about N, have the wrong shape, or are not finite.
    """
    given, selector = _split(method, signals or {}, named)
    selector = selector.resolve(None, keep_ratio)
    stage = selector.stages()[0]
    views = _grids(grid_thw)
    modality = "video" if any(t > 1 for t, _, _ in views) else "image"
    values = _by_requirement(selector, stage, given)
    _check_given(selector, stage, modality, features, values)
    n = _count_tokens(features, values, views)
    tensors = [*([] if features is None else [features]), *values.values()]
    device = tensors[0].device if tensors else torch.device("cpu")
    grids = views or ((1, 1, n),)
    for signal in stage.requires:
        if signal.reads is TokenGrids and signal not in values:
            values[signal] = signal.compute(TokenGrids(grids, device))
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


def _split(
    method: str, signals: Mapping[type[Signal] | Signal, Tensor], named: Mapping[str, Any]
) -> tuple[dict[type[Signal] | Signal, Tensor], Selector]:
    """Signals as they were given, and the method with what is left of `named` as its options."""
    shared = {kind.name: kind for kind in SHARED}
    tensors = {name for name, value in named.items() if name in shared or isinstance(value, Tensor)}
    selector = get_selector(method, **{name: value for name, value in named.items() if name not in tensors})
    by_name = shared | {signal.name: type(signal) for signal in selector.stages()[0].requires}
    unknown = sorted(tensors - set(by_name))
    if unknown:
        raise ConfigError(f"{method} reads no signal {', '.join(unknown)}; by name it takes {', '.join(by_name)}.")
    given: dict[type[Signal] | Signal, Tensor] = {
        by_name[name]: named[name] for name in sorted(tensors) if named[name] is not None
    }
    for key, value in signals.items():
        kind = key if isinstance(key, type) else type(key)
        if not issubclass(kind, Signal):
            raise ConfigError(f"signals maps types of signals to tensors, got the key {key!r}.")
        given[key] = value
    return given, selector


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


def _grids(grid_thw: Tensor | Sequence[int] | Sequence[Sequence[int]] | None) -> tuple[Grid, ...]:
    """Views as triples; empty if none were given."""
    if grid_thw is None:
        return ()
    try:
        views = torch.as_tensor(grid_thw)
    except (TypeError, ValueError) as error:
        raise InputError(f"grid_thw must be (t, h, w) or one such triple per view, got {grid_thw!r}.") from error
    if views.ndim not in (1, 2) or views.shape[-1] != 3 or views.is_floating_point() or bool((views < 1).any()):
        raise InputError(f"grid_thw must be (t, h, w) of positive integers, or one triple per view, got {grid_thw!r}.")
    return tuple((t, h, w) for t, h, w in views.reshape(-1, 3).tolist())


def _count_tokens(features: Tensor | None, values: Mapping[Signal, Tensor], views: tuple[Grid, ...]) -> int:
    """N, which every input that has a token axis must agree on."""
    if features is not None and features.ndim == 0:
        raise InputError("features: a scalar has no axis of N tokens.")
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
