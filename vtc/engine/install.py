"""Install an engine on a model, find it, and take it off again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from vtc.adapters.base import Adapter
from vtc.config import CompressionConfig
from vtc.engine.engine import Engine
from vtc.engine.plan import make_plan
from vtc.errors import StateError, UnsupportedModelError
from vtc.registry import get_adapter

__all__ = ["adapter_for", "engine_of", "find_engine", "install", "paused", "uninstall", "unwrap"]

_ATTRIBUTE = "_vtc_engine"


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT model.

    Raises
    ------
    UnsupportedModelError
        It is no transformers model with a language model inside.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(inner, "config") or not hasattr(inner, "get_decoder"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model with a language model inside")
    return inner


def adapter_for(model: nn.Module) -> Adapter:
    """Create the adapter of a model, by `config.model_type`.

    Raises
    ------
    UnsupportedModelError
        The family is not known.
    """
    target = unwrap(model)
    adapter: Adapter = get_adapter(str(target.config.model_type))(target)
    return adapter


def find_engine(model: nn.Module) -> Engine | None:
    """Return the engine installed on a model, or None."""
    engine: Engine | None = unwrap(model).__dict__.get(_ATTRIBUTE)
    return engine


def engine_of(model: nn.Module) -> Engine:
    """Return the engine installed on a model.

    Raises
    ------
    StateError
        There is none.
    """
    engine = find_engine(model)
    if engine is None:
        raise StateError("the model is not compressed; call vtc.compress(model, ...) first")
    return engine


def install(model: nn.Module, configs: Sequence[CompressionConfig]) -> Engine:
    """Plan, then put an engine on the model in place of the one that may be there; an error changes nothing."""
    target, adapter = unwrap(model), adapter_for(model)
    engine = Engine(target, adapter, make_plan(configs, adapter))
    before = find_engine(model)
    if before is not None:
        before.uninstall()
    try:
        engine.install()
    except BaseException:
        if before is not None:
            before.install()
        raise
    setattr(target, _ATTRIBUTE, engine)
    return engine


def uninstall(model: nn.Module) -> Engine | None:
    """Take the engine off the model and return it; None if there was none."""
    engine: Engine | None = unwrap(model).__dict__.pop(_ATTRIBUTE, None)
    if engine is not None:
        engine.uninstall()
    return engine


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Take the engine off while entered, and put the same one back, with its settings and its last report."""
    before = uninstall(model)
    try:
        yield
    finally:
        uninstall(model)
        if before is not None:
            before.install()
            setattr(unwrap(model), _ATTRIBUTE, before)
