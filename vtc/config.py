"""`CompressionConfig`: everything that determines a compression, as one frozen value that survives JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ._version import package_version
from .budget import check_budget, check_seed
from .core.sites import Site, parse_site
from .errors import ConfigError
from .files import write_text
from .plain import parse_json, plain, shown

__all__ = ["CompressionConfig", "load_stages", "save_stages"]

DEFAULT_METHOD = "vtc"
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
        "compact": positions are renumbered without gaps, as some papers do. Of (t, h, w) positions there is such a
        numbering only where pictures become smaller at the pixels: that of a prompt with the smaller pictures. What
        later stages drop of these leaves gaps.
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
            raise ConfigError(f"method must be the id of a method, got {shown(self.method)}.")
        ratio, tokens = check_budget(self.keep_ratio, self.keep_tokens)
        for name, allowed in (("positions", POSITIONS), ("structural", STRUCTURAL)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ConfigError(f"{name} must be one of {allowed}, got {shown(value)}.")
        at = None if self.at is None else str(parse_site(self.at))
        if not isinstance(self.options, Mapping):
            raise ConfigError(f"options must be a mapping from option names to values, got {shown(self.options)}.")
        own = {"keep_ratio": ratio, "keep_tokens": tokens, "seed": check_seed(self.seed), "at": at}
        own |= {name: plain(getattr(self, name), name) for name in ("method", "positions", "structural", "options")}
        for name, value in own.items():
            object.__setattr__(self, name, value)

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
            raise ConfigError(
                f"Unknown keys {shown(unknown)} in a configuration of version {shown(stamp)}. Known keys: {known}."
            )
        if "method" not in data:
            raise ConfigError(f"The configuration names no method; found the keys {shown(sorted(map(str, data)))}.")
        return cls(**{name: data[name] for name in known if name in data})

    def to_json(self) -> str:
        """Return indented JSON, stable from run to run."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> CompressionConfig:
        """Read what `to_json` returned; raise `ConfigError` for what is not JSON."""
        if not isinstance(text, (str, bytes, bytearray)):
            raise ConfigError(f"A configuration is read from a text of JSON, got {shown(text)}.")
        try:
            data = parse_json(text)
        except ConfigError as error:
            raise ConfigError(f"The configuration is not valid JSON: {error}.") from error
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file, in full or not at all (see `vtc.files.replacing`)."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompressionConfig:
        """Read what `save` wrote; a `ConfigError` names the file: it is missing, unreadable, or no configuration."""
        text = _read(path)
        try:
            return cls.from_json(text)
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from error


def save_stages(path: str | os.PathLike[str], stages: Sequence[CompressionConfig]) -> None:
    """Write configurations that are applied one after the other to one file, in full or not at all."""
    listed = [config.to_dict() for config in stages]
    write_text(path, json.dumps(listed, indent=2, allow_nan=False) + "\n")


def load_stages(path: str | os.PathLike[str]) -> list[CompressionConfig]:
    """Read what `save_stages` or `CompressionConfig.save` wrote.

    Raises
    ------
    ConfigError
        The file is missing, unreadable, or holds no configuration; the message names it.
    """
    text = _read(path)
    try:
        found = parse_json(text)
        listed = found if isinstance(found, list) else [found]
        if not listed:
            raise ConfigError("the list of configurations is empty")
        return [CompressionConfig.from_dict(each) for each in listed]
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from error


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{os.fspath(path)}: no such file.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{os.fspath(path)}: this is a folder, not the file of a configuration.") from error
    except (OSError, ValueError) as error:  # ValueError: also of a path with a null character
        raise ConfigError(f"{os.fspath(path)!r}: {getattr(error, 'strerror', None) or error}.") from error


def _listed(value: Any) -> Any:
    """`plain` undone: JSON's own types."""
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
