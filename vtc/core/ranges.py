"""What a method's options may be when they are searched for."""

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

    def suggest(self, trial: Any, name: str) -> float:
        """A value from an optuna trial."""
        return float(trial.suggest_float(name, self.low, self.high, log=self.log))


@dataclass(frozen=True)
class Int:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int

    def suggest(self, trial: Any, name: str) -> int:
        """A value from an optuna trial."""
        return int(trial.suggest_int(name, self.low, self.high))


@dataclass(frozen=True)
class Choice:
    """One of a few values: numbers, strings or truth values."""

    values: tuple[Any, ...]

    def suggest(self, trial: Any, name: str) -> Any:
        """A value from an optuna trial."""
        return trial.suggest_categorical(name, list(self.values))


@dataclass(frozen=True)
class Each:
    """A tuple of `count` values, each of its own within `values`: one for every layer or place."""

    values: Float | Int | Choice
    count: int

    def suggest(self, trial: Any, name: str) -> tuple[Any, ...]:
        """Values from an optuna trial."""
        return tuple(self.values.suggest(trial, f"{name}.{place}") for place in range(self.count))


Range = Float | Int | Choice | Each
