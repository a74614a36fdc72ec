"""Search spaces: the ranges of a method's options as questions to an optuna trial."""

from __future__ import annotations

from typing import Any

from vtc.core.ranges import Choice, Each, Float, Int, Range

__all__ = ["Choice", "Each", "Float", "Int", "Range", "suggest"]


def suggest(trial: Any, name: str, values: Range) -> Any:
    """Ask a trial for a value within a range.

    Parameters
    ----------
    trial : optuna.trial.BaseTrial
    name : str
        Of the option; the parts of an `Each` are called ``name.0``, ``name.1``, ...
    values : Range

    Returns
    -------
    A number, one of the choices, or a tuple of them.
    """
    if isinstance(values, Each):
        return tuple(suggest(trial, f"{name}.{place}", values.values) for place in range(values.count))
    if isinstance(values, Choice):
        return trial.suggest_categorical(name, list(values.values))
    if isinstance(values, Int):
        return int(trial.suggest_int(name, values.low, values.high))
    return float(trial.suggest_float(name, values.low, values.high, log=values.log))
