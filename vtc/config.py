"""`CompressionConfig`: everything that determines a compression, as one frozen value that survives JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ._version import package_version
from .budget import check_budget
from .core.sites import Site, parse_site
from .errors import ConfigError

__all__ = ["CompressionConfig"]

POSITIONS = ("original", "compact")
STRUCTURAL = ("keep", "drop")


@dataclass(frozen=True)
class CompressionConfig:
    """One compression of a model's visual tokens, as a value.

    Parameters
    ----------
    method
        Method id, e.g. "divprune"; whether it exists is checked when it is looked up.
    keep_ratio, keep_tokens
        Fraction of visual tokens kept, in (0, 1], or number kept per image or video: exactly one of the two.
    positions
        "original": kept tokens keep their position ids and the text continues as if nothing had been removed;
        "compact": positions are renumbered without gaps, as some papers do.
    structural
        "keep" or "drop" newline and separator tokens.
    seed
        Seed of the generator that selectors are given.
    options
        The method's own options: strings, numbers, booleans, None, and sequences or string-keyed mappings of these.
        Sequences are stored as tuples.
    at
        Where tokens leave, as a site or its word (see `vtc.core.sites`), for methods that can work in several places;
        None: where the method says. Stored as the word.

    Raises
    ------
    ConfigError
        Naming the argument, its value and what is allowed.
    """

    method: str
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    positions: str = "original"
    structural: str = "keep"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    at: str | Site | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise ConfigError(f"method must be the id of a method, got {self.method!r}.")
        check_budget(self.keep_ratio, self.keep_tokens)
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions must be one of {POSITIONS}, got {self.positions!r}.")
        if self.structural not in STRUCTURAL:
            raise ConfigError(f"structural must be one of {STRUCTURAL}, got {self.structural!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be an integer in 0..2**63-1, got {self.seed!r}.")
        if self.at is not None:
            object.__setattr__(self, "at", str(parse_site(self.at)))
        if not isinstance(self.options, Mapping):
            raise ConfigError(f"options must be a mapping from option names to values, got {self.options!r}.")
        object.__setattr__(self, "options", _plain(self.options, "options"))

    @property
    def site(self) -> Site | None:
        """`at` as a site."""
        return None if self.at is None else parse_site(self.at)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in a fixed order, and the version of this package."""
        return {"version": package_version(), **{item.name: _listed(getattr(self, item.name)) for item in fields(self)}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionConfig:
        """Read what `to_dict` returned. The version is informative: the keys decide what this version understands.

        Raises
        ------
        ConfigError
            An unknown or missing key, or an invalid value.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"A configuration is a mapping, got {type(data).__name__}.")
        known = [item.name for item in fields(cls)]
        unknown = sorted(map(str, set(data) - {"version", *known}))
        if unknown:
            stamp = data.get("version", "unknown")
            raise ConfigError(f"Unknown keys {unknown} in a configuration of version {stamp}. Known keys: {known}.")
        if "method" not in data:
            raise ConfigError(f"The configuration names no method; found the keys {sorted(data)}.")
        return cls(**{name: data[name] for name in known if name in data})

    def to_json(self) -> str:
        """Return indented JSON, stable from run to run."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CompressionConfig:
        """Read what `to_json` returned; raise `ConfigError` for what is not JSON."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"The configuration is not valid JSON: {error}.") from error
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompressionConfig:
        """Read what `save` wrote; a `ConfigError` names the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from error


def _plain(value: Any, where: str) -> Any:
    """A private copy made of JSON's types, sequences as tuples, so that equality survives a round trip."""
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{where}: keys must be strings, got {bad[0]!r}.")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item, where) for item in value)
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and abs(value) < float("inf")):
        return value
    raise ConfigError(
        f"{where}: {value!r} cannot be written to JSON; use strings, finite numbers, booleans or sequences."
    )


def _listed(value: Any) -> Any:
    """`_plain` undone: JSON's own types."""
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
