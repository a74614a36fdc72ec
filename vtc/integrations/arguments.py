"""Arguments of other programs that begin with ``vtc_``, as a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtc.config import CompressionConfig
from vtc.errors import ConfigError
from vtc.plain import parse_json
from vtc.registry import get_selector

__all__ = ["PREFIX", "configuration", "parted"]

PREFIX = "vtc_"
SHARED = ("method", "keep_ratio", "keep_tokens", "positions", "structural", "seed", "at")


def parted(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide arguments into those that begin with ``vtc_``, without these letters, and all others."""
    ours = {name.removeprefix(PREFIX): value for name, value in arguments.items() if name.startswith(PREFIX)}
    return ours, {name: value for name, value in arguments.items() if not name.startswith(PREFIX)}


def configuration(ours: Mapping[str, Any]) -> CompressionConfig:
    """Make a configuration of arguments without their prefix.

    ``method``, ``keep_ratio``, ``keep_tokens``, ``positions``, ``structural``, ``seed`` and ``at`` are the arguments of
    `vtc.compress`; any other is an option of the method, a text that is JSON being read as such.

    Raises
    ------
    ConfigError, UnsupportedMethodError
        There is no such method or option, or a value is out of range.
    """
    shared = {name: ours[name] for name in SHARED if name in ours}
    options = {name: _parsed(value) for name, value in ours.items() if name not in SHARED}
    config = CompressionConfig(**shared, options=options)
    get_selector(config.method, **config.options)
    return config


def _parsed(value: Any) -> Any:
    """Parse a list or a mapping that came as text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ConfigError:
        return value
