"""Layers and ratios of methods with several stages, and the checks of their options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError

__all__ = [
    "at_depth",
    "average_kept",
    "check_fraction",
    "check_layer",
    "check_layers",
    "check_number",
    "layers_at_depth",
    "stretches",
]


def at_depth(layer: int, of: int, depth: int) -> int:
    """Scale layer `layer` of a decoder of `of` layers to one of `depth` layers."""
    return round(layer * depth / of)


def stretches(layers: Sequence[int], depth: int) -> list[int]:
    """Count the decoder layers before the first stage inside, between stages, and behind the last."""
    return [stop - start for start, stop in itertools.pairwise([0, *layers, depth])]


def average_kept(ratios: Sequence[float], lengths: Sequence[int]) -> float:
    """Compute the fraction of the visual tokens that a layer sees on average.

    Parameters
    ----------
    ratios
        What each stage keeps of what enters it.
    lengths
        How many layers run behind each stage, until the next.
    """
    kept, total = 1.0, 0.0
    for ratio, length in zip(ratios, lengths, strict=True):
        kept *= ratio
        total += kept * length
    return total / sum(lengths)


def check_layer(method: str, option: str, value: Any, *, least: int = 0) -> None:
    """Raise ConfigError unless `value` is a layer number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{method}: {option} must be an integer of at least {least}, got {value!r}.")


def check_layers(method: str, value: Any, most: int | None = None) -> tuple[int, ...] | None:
    """Return decoder layers on entering which a method works as a tuple; None: None.

    Raises
    ------
    ConfigError
        They are not ascending layer numbers of at least 1, or more than `most`.
    """
    if value is None:
        return None
    layers = tuple(value) if isinstance(value, (list, tuple)) else (value,)  # JSON has lists only
    for layer in layers:
        check_layer(method, "layers", layer, least=1)
    if not layers or list(layers) != sorted(set(layers)) or len(layers) > (most or len(layers)):
        some = "" if most is None else f"at most {most} "
        raise ConfigError(f"{method}: layers must be {some}ascending decoder layers, got {value!r}.")
    return layers


def layers_at_depth(layers: Sequence[int], of: int, depth: int) -> tuple[int, ...]:
    """Scale layers of a decoder of `of` layers to one of `depth` layers, fewer of them where two would coincide."""
    return tuple(sorted({max(1, min(at_depth(layer, of, depth), depth - 1)) for layer in layers}))


def check_number(method: str, option: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise ConfigError unless `value` is a finite number within the limits."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not least <= value <= most:
        within = f" between {least:g} and {most:g}" if most < math.inf else f" of at least {least:g}"
        raise ConfigError(f"{method}: {option} must be a number{within if least > -math.inf else ''}, got {value!r}.")


def check_fraction(method: str, option: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a number between 0 and 1."""
    check_number(method, option, value, 0, 1)
