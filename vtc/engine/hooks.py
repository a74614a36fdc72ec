"""Hooks: how the engine stands in the way of one model instance, and how it leaves without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Hooks", "WrappedMethod"]


class WrappedMethod:
    """An instance attribute that stands before a method, or before what another package has put in its place.

    It names the method rather than holding it bound, so that it can be pickled, and so that a deep copy of the model
    gets one that belongs to the copy. Signature and name are those of the method: transformers reads them.
    """

    def __init__(self, owner: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        self._around: Callable[..., Any] | None = around
        self.found = (owner.__dict__[name],) if name in owner.__dict__ else ()
        """The attribute that was there before, or nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = self.__wrapped__
        return original(*args, **kwargs) if self._around is None else self._around(original, args, kwargs)

    @property
    def __wrapped__(self) -> Any:
        if self.found:
            return self.found[0]
        # Not a bound method: torch.compile cannot make one.
        return functools.partial(getattr(type(self._owner), self._name), self._owner)

    @property
    def __name__(self) -> str:
        return self._name

    def close(self) -> None:
        """Only pass calls on from now on: somebody may have kept this object."""
        self._around = None


class Hooks:
    """Everything that was installed on a model, and how to take it away."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._methods: list[tuple[nn.Module, str, WrappedMethod]] = []

    def wrap(self, owner: nn.Module, name: str, around: Callable[..., Any]) -> None:
        """Put `around(original, args, kwargs)` before the method `name` of this instance."""
        wrapped = WrappedMethod(owner, name, around)
        setattr(owner, name, wrapped)
        self._methods.append((owner, name, wrapped))

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before each forward."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """Call `hook(module, args, output)`, or `(module, args, kwargs, output)`, after each forward without errors."""
        self._handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs))

    def remove(self) -> None:
        """Take everything away, in any state of the model; a second call does nothing.

        Attributes become what they were. One that somebody has since put before ours stays, and ours passes calls on.
        """
        for handle in self._handles:
            handle.remove()
        for owner, name, wrapped in reversed(self._methods):
            wrapped.close()
            if owner.__dict__.get(name) is not wrapped:
                continue
            if wrapped.found:
                setattr(owner, name, wrapped.found[0])
            else:
                del owner.__dict__[name]
        self._handles, self._methods = [], []
