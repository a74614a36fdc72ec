"""The notation of stages in a line of text: `divprune@vision:4=0.5+snapkv(window=16, scope=all)@cache=0.5`.

A blank and the word "compact" behind the stages ask for compact positions: `resize@pixels=0.5+vtc=0.5 compact`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .config import CompressionConfig
from .errors import ConfigError
from .plain import parse_json, shown
from .registry import get_selector

__all__ = ["parse_stages", "split_positions", "split_stages", "write_stages"]

_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_NAMES = ("true", "false", "null", "NaN", "Infinity")
"""Words that JSON reads as something else than a string."""
_COMPACT = " compact"


def parse_stages(text: str) -> list[CompressionConfig]:
    """Read ``METHOD(OPTION=VALUE, ...)@SITE=KEEP``, several with a plus between them.

    KEEP is a fraction of the tokens that enter the stage, or above 1 a count. Without ``@SITE`` the method says where;
    sites are those of `vtc.core.sites`. Options stand in parentheses behind the method and are left out where all have
    their defaults; values are JSON, and words need no quotes. ``compact`` behind all stages, a blank before it, gives
    them compact positions.

    Raises
    ------
    ConfigError
        It has another form, or names what does not exist.
    """
    stages, positions = split_positions(text)
    found = []
    for setting, keep in split_stages(stages):
        called, at, site = _halves(setting, "@")
        if not called or bool(at) != bool(site):
            raise _malformed(text)
        method, options = _called(called, text)
        number = float(keep)
        get_selector(method, **options)
        budget = {"keep_ratio": number} if number <= 1 else {"keep_tokens": int(number) if number % 1 == 0 else number}
        found.append(CompressionConfig(method, positions=positions, at=site or None, options=options, **budget))
    return found


def split_positions(text: str) -> tuple[str, str]:
    """Return the stages without what stands behind them, and their positions: "compact" or "original"."""
    stages = text.removesuffix(_COMPACT)
    return stages, "original" if stages == text else "compact"


def split_stages(text: str) -> list[tuple[str, str]]:
    """Return what each stage is and what it keeps: the texts before and behind its equals sign, the latter a number.

    Raises
    ------
    ConfigError
        A stage has no such form.
    """
    found = []
    for part in _split(text, "+"):
        setting, equals, keep = _halves(part, "=")
        try:
            if not equals:
                raise ValueError
            float(keep)
        except ValueError:
            raise _malformed(text) from None
        found.append((setting, keep))
    return found


def write_stages(configs: Sequence[CompressionConfig]) -> str:
    """Write stages in the notation; what it has no place for (structural tokens, seeds) is left out."""
    parts = []
    for config in configs:
        options = ", ".join(f"{name}={_written(value)}" for name, value in config.options.items())
        at = "" if config.at is None else f"@{config.at}"
        keep = config.keep_tokens if config.keep_ratio is None else float(f"{config.keep_ratio:.6g}")
        parts.append(f"{config.method}{f'({options})' if options else ''}{at}={keep}")
    return "+".join(parts) + (_COMPACT if any(config.positions == "compact" for config in configs) else "")


def _malformed(text: str) -> ConfigError:
    return ConfigError(
        "stages are METHOD@SITE=KEEP, several joined by +, or METHOD(OPTION=VALUE, ...)@SITE=KEEP with options; got "
        f"{shown(text)}"
    )


def _called(text: str, whole: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of ``METHOD`` or ``METHOD(OPTION=VALUE, ...)``."""
    method, opened, rest = text.partition("(")
    if not opened:
        return method, {}
    if not method or not rest.endswith(")"):
        raise _malformed(whole)
    options: dict[str, Any] = {}
    for each in _split(rest[:-1], ","):
        name, equals, value = (part.strip() for part in _halves(each, "="))
        if not equals or not name or not value:
            raise ConfigError(f"{method}: options are OPTION=VALUE, joined by commas; got {shown(each.strip())}")
        if name in options:
            raise ConfigError(f"{method}: {name} is given twice in {shown(whole)}")
        options[name] = _read(method, name, value)
    return method, options


def _read(method: str, name: str, value: str) -> Any:
    """Read the value of an option: JSON, or a word."""
    if _WORD.fullmatch(value) and value not in _NAMES:
        return value
    try:
        return parse_json(value)
    except ConfigError as error:
        raise ConfigError(f"{method}: {name}={value} is neither a word nor JSON: {error}") from error


def _written(value: Any) -> str:
    if isinstance(value, str) and _WORD.fullmatch(value) and value not in _NAMES:
        return value
    return json.dumps(value)


def _halves(text: str, mark: str) -> tuple[str, str, str]:
    """Partition a text at the first `mark` outside brackets, as `str.partition` does."""
    first, *others = _split(text, mark)
    return first, mark if others else "", mark.join(others)


def _split(text: str, mark: str) -> list[str]:
    """Split a text at every `mark` outside brackets and quotes."""
    parts, start, depth, quoted, escaped = [], 0, 0, False, False
    for place, sign in enumerate(text):
        if escaped or (quoted and sign == "\\"):
            escaped = not escaped
        elif sign == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign == mark and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]
