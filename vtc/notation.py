"""The notation of stages in a line of text: `divprune@vision:4=0.5+divprune@decoder=0.5`."""

from __future__ import annotations

from collections.abc import Sequence

from .config import CompressionConfig
from .errors import ConfigError
from .registry import get_selector

__all__ = ["parse_stages", "write_stages"]


def parse_stages(text: str) -> list[CompressionConfig]:
    """Read ``METHOD@SITE=KEEP``, several with a plus between them; without ``@SITE`` the method says where.

    KEEP is a fraction of the tokens that enter the stage, or above 1 a count. Sites are those of `vtc.core.sites`.

    Raises
    ------
    ConfigError
        It has another form, or names what does not exist.
    """
    found = []
    for part in text.split("+"):
        setting, equals, keep = part.partition("=")
        method, at, site = setting.partition("@")
        try:
            if not equals or not method or bool(at) != bool(site):
                raise ValueError
            number = float(keep)
        except ValueError:
            raise ConfigError(f"stages are METHOD@SITE=KEEP, several joined by +; got {text!r}") from None
        get_selector(method)
        budget = {"keep_ratio": number} if number <= 1 else {"keep_tokens": int(number) if number % 1 == 0 else number}
        found.append(CompressionConfig(method, at=site or None, **budget))
    return found


def write_stages(configs: Sequence[CompressionConfig]) -> str:
    """Write stages in the notation; what it has no place for (options, positions, seeds) is left out."""
    parts = []
    for config in configs:
        at = "" if config.at is None else f"@{config.at}"
        keep = config.keep_tokens if config.keep_ratio is None else float(f"{config.keep_ratio:.6g}")
        parts.append(f"{config.method}{at}={keep}")
    return "+".join(parts)
