"""Ranges: the values that an option of a method may take when `vtc.calibrate` searches for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Choice", "Each", "Float", "Int", "Range"]


@dataclass(frozen=True)
class Float:
    """A number between `low` and `high`; on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Int:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True)
class Choice:
    """One of a few values: numbers, strings or truth values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Each:
    """A tuple of `count` values, each within `values`: one for every layer or stage."""

    values: Float | Int | Choice
    count: int


Range = Float | Int | Choice | Each
