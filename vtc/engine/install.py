"""Install an engine on a model, find it, and take it off again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vtc.adapters.base import Adapter
from vtc.config import CompressionConfig
from vtc.engine.engine import Engine
from vtc.engine.plan import make_plan
from vtc.errors import StateError, UnsupportedModelError
from vtc.registry import get_adapter

__all__ = ["adapter_for", "engine_of", "find_engine", "install", "paused", "uninstall", "unwrap"]

_ATTRIBUTE = "_vtc_engine"


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside the wrappers of PEFT, `torch.compile`, DDP, FSDP and DeepSpeed.

    Raises
    ------
    UnsupportedModelError
        It is no transformers model with a language model inside, or in a wrapper that copies the model, or what is
        under its head was compiled by itself.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.DataParallel) and len(inner.device_ids) > 1:
            raise UnsupportedModelError(
                "nn.DataParallel copies the model to its devices at every call, without what compress() installs; use "
                "DistributedDataParallel, or one device"
            )
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
            inner = wrapped
        else:
            break
    if not isinstance(inner, PreTrainedModel) or not hasattr(inner, "get_decoder"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model with a language model inside")
    if isinstance(core := getattr(inner.base_model, "_orig_mod", None), nn.Module):
        raise UnsupportedModelError(
            f"the {type(core).__name__} inside this {type(inner).__name__} was compiled by itself, which hides where "
            "tokens leave; compile the whole model, its language model or its layers"
        )
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
    """Return the engine installed on a model, on what it is a part of, or on the part of it that has its layers."""
    target = unwrap(model)
    engine: Engine | None = target.__dict__.get(_ATTRIBUTE) or target.base_model.__dict__.get(_ATTRIBUTE)
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
    """Plan, then put an engine on the model in place of the one that may be there; an error changes nothing.

    Raises
    ------
    StateError
        Calls of the model are running, or a part of it, or what it is a part of, is compressed by itself.
    """
    target, adapter = unwrap(model), adapter_for(model)
    before = find_engine(model)
    if before is not None:
        if before.model is not target:
            raise StateError(
                f"{type(before.model).__name__} is compressed already and shares its layers with this "
                f"{type(target).__name__}; call vtc.restore on that one first"
            )
        before.calls.refuse_while_open("compress() changes the compression")
    engine = Engine(target, adapter, make_plan(configs, adapter))
    if before is not None:
        before.uninstall()
    try:
        engine.install()
    except BaseException:
        if before is not None:
            before.install()
        raise
    _mark(engine)
    return engine


def uninstall(model: nn.Module) -> Engine | None:
    """Take the engine off the model and return it; None if there was none.

    Raises
    ------
    StateError
        Calls of the model are running.
    """
    engine = find_engine(model)
    if engine is not None:
        engine.calls.refuse_while_open("restore() takes the compression away")
        for part in (engine.model, engine.adapter.base):
            part.__dict__.pop(_ATTRIBUTE, None)
        engine.uninstall()
        _forget_compiled()
    return engine


def _mark(engine: Engine) -> None:
    for part in (engine.model, engine.adapter.base):
        setattr(part, _ATTRIBUTE, engine)
    _forget_compiled()


def _forget_compiled() -> None:
    """Drop compiled code: it does not look at hooks again, and would go on as if nothing had changed."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.convert_frame.input_codes.seen:
        torch.compiler.reset()


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
            _mark(before)
