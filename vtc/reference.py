"""The project's own small trained models, if the ``vtc-reference`` distribution is installed.

The weights live in a distribution of their own (``eval/reference`` of the repository), so that installing ``vtc`` stays
light. This module finds it, or says how to get it.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vtc.errors import ConfigError, StateError

if TYPE_CHECKING:
    import torch

__all__ = ["available", "clips", "load", "modules", "names", "samples"]


def _distribution() -> ModuleType:
    try:
        return importlib.import_module("vtc_reference")
    except ModuleNotFoundError as missing:
        if missing.name != "vtc_reference":
            raise
        raise StateError(
            "the reference models were asked for, but the distribution vtc-reference is not installed; from a checkout "
            "of the repository run: pip install ./eval/reference"
        ) from missing


def available() -> bool:
    """Tell whether ``vtc-reference`` is installed."""
    return importlib.util.find_spec("vtc_reference") is not None


def names() -> tuple[str, ...]:
    """Return the names of the reference models.

    Raises
    ------
    StateError
        If ``vtc-reference`` is not installed.
    """
    return tuple(_distribution().names())


def load(name: str = "llava", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a reference model, as the stock transformers class in eval mode, with its processor.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    dtype : torch.dtype, optional
        float32 unless given.

    Returns
    -------
    (model, processor)

    Raises
    ------
    StateError
        If ``vtc-reference`` is not installed.
    ConfigError
        If there is no model of that name.
    """
    _check(name)
    distribution = _distribution()
    return distribution.load(name) if dtype is None else distribution.load(name, dtype)


def modules(name: str = "llava") -> dict[str, Path]:
    """Return the folders of trained modules that ship with a reference model, by their names, such as "llava-mini-4".

    Raises
    ------
    StateError
        If ``vtc-reference`` is not installed.
    ConfigError
        If there is no model of that name.
    """
    _check(name)
    return dict(_distribution().modules(name))


def samples() -> list[Path]:
    """Return the paths of the sample images that ship with the models.

    Raises
    ------
    StateError
        If ``vtc-reference`` is not installed.
    """
    return list(_distribution().samples())


def clips() -> list[Path]:
    """Return the paths of the sample clips that ship with the models: short videos for those that take them.

    Raises
    ------
    StateError
        If ``vtc-reference`` is not installed.
    """
    return list(_distribution().clips())


def _check(name: str) -> None:
    """Raise ConfigError unless there is a model of this name."""
    known = names()
    if name not in known:
        raise ConfigError(f"no reference model is called {name!r}; there are: {', '.join(known)}")
