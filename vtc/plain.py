"""Values of any origin as Python's own: NumPy's numbers, members of enumerations, and what JSON can hold."""

from __future__ import annotations

import json
import math
import numbers
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

from .errors import ConfigError

__all__ = ["integer", "parse_json", "plain", "real", "shown"]

_DEPTH = 32
_LARGEST = 2**63

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def shown(value: Any) -> str:
    """Return what `repr` says, shortened for a message; whatever the value is, there is one."""
    try:
        return _SHORT.repr(value)
    except Exception:  # too many digits or levels, or a broken class
        return f"a value of type {type(value).__name__}"


def integer(value: Any) -> int | None:
    """Return an integer of any type, NumPy's too, as an int; None for everything else, booleans too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return int(value)


def real(value: Any) -> int | float | None:
    """Return a real number of any type, NumPy's too, as a float, integers as int; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def plain(value: Any, where: str, *, strict: bool = True, depth: int = 0) -> Any:
    """Return a private copy made of JSON's types, sequences as tuples, so that equality survives a round trip.

    Parameters
    ----------
    value
        Strings, booleans, None, finite numbers of any type, members of enumerations, and sequences and mappings of
        these.
    where
        What messages call it.
    strict
        Whether to refuse what JSON cannot hold; otherwise that stays as it is.
    depth
        Levels above it.

    Raises
    ------
    ConfigError
        It, or something in it, is none of these, or it has more levels than JSON is read with.
    """
    if depth > _DEPTH:
        raise ConfigError(f"{where[:120]}: more than {_DEPTH} levels of sequences or mappings; use fewer.")
    if isinstance(value, Enum):
        value = value.value
    if getattr(value, "ndim", None) == 0:  # a number of NumPy, its bool_ among them, or a tensor of one
        with suppress(Exception):
            value = value.item()
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{where}: keys must be strings, got {shown(bad[0])}.")
        return {str(key): plain(item, f"{where}.{key}", strict=strict, depth=depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(item, where, strict=strict, depth=depth + 1) for item in value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    number = real(value)
    large = isinstance(number, int) and abs(number) >= _LARGEST
    if not strict and not large:
        return value if number is None else number
    if number is None or large or not math.isfinite(number):
        raise ConfigError(
            f"{where}: {shown(value)} cannot be written to JSON; use strings, finite numbers, integers of 64 bits, "
            "booleans or sequences."
        )
    return number


def parse_json(text: str | bytes) -> Any:
    """Read JSON of any origin.

    Raises
    ------
    ConfigError
        Saying in one clause why it is none.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ConfigError("too many levels of lists or objects") from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ConfigError(str(error)) from error
