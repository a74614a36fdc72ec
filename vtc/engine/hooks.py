"""Hooks: how the engine stands in the way of one model instance, and how it leaves without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Hooks", "WrappedMethod"]


class WrappedMethod:
    """An instance attribute that stands before a bound method.

    A class rather than a closure so that a deep copy of the model gets one that belongs to the copy. transformers reads
    the signature of these methods, which `update_wrapper` keeps.
    """

    def __init__(self, original: Callable[..., Any], around: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._original, self._around = original, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._original, args, kwargs)


class Hooks:
    """Everything that was installed on a model, and how to take it away."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._methods: list[tuple[nn.Module, str]] = []

    def wrap(self, owner: nn.Module, name: str, around: Callable[..., Any]) -> None:
        """Put `around(original, args, kwargs)` before the method `name` of this instance."""
        setattr(owner, name, WrappedMethod(getattr(owner, name), around))
        self._methods.append((owner, name))

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before each forward."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """Call `hook(module, args, output)` after each forward; if `always`, also when it raised."""
        self._handles.append(module.register_forward_hook(hook, always_call=always))

    def remove(self) -> None:
        """Take everything away, in any state of the model; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        for owner, name in self._methods:
            owner.__dict__.pop(name, None)
        self._handles, self._methods = [], []
