"""Names to classes: methods by id, adapters by `config.model_type`, both open to other packages through entry points.

Registering is a declaration, checked when it is made. Nothing is imported until a name is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError, UnsupportedMethodError, UnsupportedModelError, VtcError

if TYPE_CHECKING:  # it brings torch, which commands that only show their help do without
    from .core.selector import Selector

__all__ = [
    "adapters",
    "get_adapter",
    "get_selector",
    "register_adapter",
    "register_selector",
    "selectors",
]

T = TypeVar("T", bound=type)


class _Registry:
    """One table of names, filled by the decorators in the package `group` and by the entry points of the same name.

    The name of an entry point is the id, so that a package is loaded only when its id is asked for.
    """

    def __init__(self, what: str, group: str, miss: type[VtcError], check: Callable[[type], None]) -> None:
        self.what, self.group, self.miss, self.check = what, group, miss, check
        self._classes: dict[str, type] = {}

    def add(self, name: str, cls: type) -> None:
        self.check(cls)
        if not name or name != name.lower() or name != name.strip():
            raise ConfigError(f"A {self.what} id is lower case and not empty, got {name!r} for {cls.__qualname__}.")
        known = self._classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"The {self.what} id {name!r} of {_path(cls)} is taken by {_path(known)}.")
        self._classes[name] = cls

    def get(self, name: str) -> type:
        importlib.import_module(self.group)
        if name not in self._classes:
            self._load(point for point in self._entry_points() if point.name == name)
        if name not in self._classes:
            names = self.names()
            close = difflib.get_close_matches(str(name).lower(), names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise self.miss(f"Unknown {self.what} {name!r}.{hint} Known: {', '.join(names)}.")
        return self._classes[name]

    def all(self) -> dict[str, type]:
        importlib.import_module(self.group)
        self._load(point for point in self._entry_points() if point.name not in self._classes)
        return dict(sorted(self._classes.items()))

    def names(self) -> list[str]:
        return sorted({*self._classes, *(point.name for point in self._entry_points())})

    def _entry_points(self) -> Iterable[importlib.metadata.EntryPoint]:
        return importlib.metadata.entry_points(group=self.group)

    def _load(self, points: Iterable[importlib.metadata.EntryPoint]) -> None:
        for point in points:
            try:
                loaded = point.load()
            except Exception as error:
                raise ConfigError(
                    f"The entry point {point.name} = {point.value} of {self.group} cannot be loaded: {error}"
                ) from error
            if not inspect.isclass(loaded):
                raise ConfigError(
                    f"The entry point {point.name} = {point.value} of {self.group} must name a class, found {loaded!r}."
                )
            self.add(point.name, loaded)


def _check_selector(cls: type) -> None:
    from .core.selector import Selector

    if not issubclass(cls, Selector):
        raise ConfigError(f"{_path(cls)} must derive from Selector to be registered.")
    params = vars(cls).get("__dataclass_params__")  # vars: a subclass that forgot the decorator inherits its parent's
    if params is None or not params.frozen:
        raise ConfigError(
            f"{_path(cls)} must be a frozen dataclass: put @dataclass(frozen=True) under @register_selector."
        )
    for attribute in ("name", "paper"):
        if not isinstance(getattr(cls, attribute, None), str):
            raise ConfigError(f"{_path(cls)} must set the class attribute {attribute!r} to a string.")
    if bare := [option for option, default in cls.options().items() if default is dataclasses.MISSING]:
        raise ConfigError(f"{_path(cls)}: the options {bare} need (immutable) defaults.")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


_SELECTORS = _Registry("method", "vtc.selectors", UnsupportedMethodError, _check_selector)
_ADAPTERS = _Registry("model type", "vtc.adapters", UnsupportedModelError, lambda cls: None)


def register_selector(cls: T) -> T:
    """Make a `Selector` available under its `name`; a class decorator.

    Raises
    ------
    ConfigError
        It is not a frozen dataclass derived from `Selector`, lacks a name or a paper, has an option without a default,
        or the name is taken.
    """
    _SELECTORS.add(getattr(cls, "name", ""), cls)
    return cls


def get_selector(name: str, **options: Any) -> Selector:
    """Create the method `name` with `options`.

    Raises
    ------
    UnsupportedMethodError
        There is no such method; the message lists those that exist and the closest.
    ConfigError
        An option is unknown or invalid.
    """
    cls: type[Selector] = _SELECTORS.get(name)
    known = cls.options()
    unknown = sorted(set(options) - set(known))
    if unknown:
        listed = ", ".join(f"{option}={default!r}" for option, default in known.items()) or "none"
        raise ConfigError(f"{name} has no option {', '.join(map(repr, unknown))}. Its options and defaults: {listed}.")
    return cls(**options)


def selectors() -> dict[str, type[Selector]]:
    """Return all methods, those of other packages included: id to class, sorted."""
    return _SELECTORS.all()


def register_adapter(*model_types: str) -> Callable[[T], T]:
    """Use this adapter for models whose `config.model_type` is one of `model_types`; a class decorator.

    Raises
    ------
    ConfigError
        No model type given, or one of them is not lower case or already taken.
    """
    if not model_types:
        raise ConfigError('register_adapter needs at least one model type: @register_adapter("llava").')

    def register(cls: T) -> T:
        for model_type in model_types:
            _ADAPTERS.add(model_type, cls)
        return cls

    return register


def get_adapter(model_type: str) -> type[Any]:
    """Return the adapter class for a `config.model_type`.

    Raises
    ------
    UnsupportedModelError
        There is none; the message lists the supported model types and the closest.
    """
    return _ADAPTERS.get(model_type)


def adapters() -> dict[str, type[Any]]:
    """Return all adapters, those of other packages included: model type to class, sorted."""
    return _ADAPTERS.all()
