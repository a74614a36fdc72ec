"""Names to classes: methods by id, adapters by `config.model_type`, both open to other packages through entry points.

Registering is a declaration, checked when it is made. Nothing is imported until a name is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError, UnsupportedMethodError, UnsupportedModelError, VtcError
from .plain import plain, shown

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

_NOT_OFFERED = {
    "adakv": "it gives the heads of a layer different numbers of entries, and one mask serves all heads of a layer",
    "lookaheadkv": "it needs trained parts: learned tokens behind the prompt, and adapters of the decoder for them",
    "pod": "it needs training: the decoder has to be adapted to layers that share their keys",
}
"""Methods that people may look for, in lower case without hyphens, and why they are not here."""


class _Registry:
    """One table of names, filled by the decorators in the package `group` and by the entry points of the same name.

    The name of an entry point is the id, so that a package is loaded only when its id is asked for. `check` is made of
    every class, when it is decorated; `probe` may use the class and is made of loaded ones, whose module is complete.
    """

    def __init__(
        self,
        what: str,
        group: str,
        miss: type[VtcError],
        check: Callable[[type], None],
        probe: Callable[[type], None] = lambda cls: None,
    ) -> None:
        self.what, self.group, self.miss, self.check, self.probe = what, group, miss, check, probe
        self._classes: dict[str, type] = {}
        self._warned: set[str] = set()

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
            failures = self._load(point for point in self._entry_points() if point.name == name)
            if failures and name not in self._classes:
                raise failures[0][1]
            self._warn_of(failures)
        if name not in self._classes:
            names = self.names()
            close = difflib.get_close_matches(str(name).lower(), names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            reason = _NOT_OFFERED.get(str(name).lower().replace("-", "").replace("_", ""))
            if self.what == "method" and reason is not None:
                hint = f" It is not offered, because {reason}."
            raise self.miss(f"Unknown {self.what} {name!r}.{hint} Known: {', '.join(names)}.")
        return self._classes[name]

    def all(self) -> dict[str, type]:
        """All classes that can be had; entry points that cannot are named in a warning, once in a process."""
        importlib.import_module(self.group)
        self._warn_of(self._load(self._entry_points()))
        return dict(sorted(self._classes.items()))

    def names(self) -> list[str]:
        return sorted({*self._classes, *(point.name for point in self._entry_points())})

    def _entry_points(self) -> Iterable[importlib.metadata.EntryPoint]:
        return importlib.metadata.entry_points(group=self.group)

    def _load(self, points: Iterable[importlib.metadata.EntryPoint]) -> list[tuple[str, ConfigError]]:
        """Add the classes of these entry points; return those that cannot be added, and why."""
        failures = []
        for point in points:
            where = f"{point.name} = {point.value}"
            known = set(self._classes)
            try:
                self._add_loaded(point.name, _load_point(point))
            except Exception as error:
                for name in set(self._classes) - known:  # what registered itself before the failure
                    del self._classes[name]
                failure = ConfigError(f"The entry point {where} of {self.group} cannot be loaded: {error}")
                failure.__cause__ = error
                failures.append((where, failure))
        return failures

    def _add_loaded(self, name: str, loaded: Any) -> None:
        if not inspect.isclass(loaded):
            raise ConfigError(f"it must name a class, found {loaded!r}.")
        self.check(loaded)
        self.probe(loaded)
        self.add(name, loaded)

    def _warn_of(self, failures: Iterable[tuple[str, ConfigError]]) -> None:
        for where, failure in failures:
            if where not in self._warned:
                self._warned.add(where)
                warnings.warn(f"{failure} It is left out.", UserWarning, stacklevel=4)


def _load_point(point: importlib.metadata.EntryPoint) -> Any:
    try:
        return point.load()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit() at import ends the package, not this program
        raise ConfigError(f"{type(error).__name__} while it was imported: {error}") from error


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
    _check_concrete(cls)


def _probe_selector(cls: type) -> None:
    try:
        cls().stages()
    except Exception as error:
        raise ConfigError(f"{_path(cls)} has no stages with its default options: {error!r}") from error


def _check_adapter(cls: type) -> None:
    # By name: this module is below the adapters, which are being imported when theirs are checked.
    if not issubclass(cls, importlib.import_module("vtc.adapters.base").Adapter):
        raise ConfigError(f"{_path(cls)} must derive from vtc.adapters.base.Adapter to be registered.")
    _check_concrete(cls)


def _check_concrete(cls: type) -> None:
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise ConfigError(f"{_path(cls)} must define {', '.join(missing)}.")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


_SELECTORS = _Registry("method", "vtc.selectors", UnsupportedMethodError, _check_selector, _probe_selector)
_ADAPTERS = _Registry("model type", "vtc.adapters", UnsupportedModelError, _check_adapter)


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


def get_selector(name: str, /, **options: Any) -> Selector:
    """Create the method `name` with `options`.

    Raises
    ------
    UnsupportedMethodError
        There is no such method; the message lists those that exist and the closest.
    ConfigError
        An option is unknown or invalid.
    """
    if not isinstance(name, str):
        raise ConfigError(f"method must be the id of a method, got {shown(name)}.")
    cls: type[Selector] = _SELECTORS.get(name)
    known = cls.options()
    unknown = sorted(set(options) - set(known))
    if unknown:
        listed = ", ".join(f"{option}={default!r}" for option, default in known.items()) or "none"
        raise ConfigError(f"{name} has no option {', '.join(map(repr, unknown))}. Its options and defaults: {listed}.")
    try:
        return cls(**plain(options, name, strict=False))
    except VtcError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:  # a value of a type that the method does not foresee
        raise ConfigError(f"{name} does not take the options {shown(options)}: {error}.") from error


def selectors(pattern: str = "*") -> dict[str, type[Selector]]:
    """Return all methods, those of other packages included: id to class, sorted.

    Parameters
    ----------
    pattern
        Only those whose id matches, with the wildcards of a shell.

    Raises
    ------
    UnsupportedMethodError
        None matches.
    """
    found = _SELECTORS.all()
    matching = {name: cls for name, cls in found.items() if fnmatch.fnmatchcase(name, pattern.lower())}
    if not matching:
        close = difflib.get_close_matches(pattern.lower().strip("*"), found, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnsupportedMethodError(f"No method matches {pattern!r}.{hint} Known: {', '.join(found)}.")
    return matching


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
