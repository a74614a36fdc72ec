"""Limits of arguments: a value beyond them is taken for a mistake and refused before any long work.

They lie far above what a model or a machine can use, so that they stop a slip of the keyboard and nothing else. This
module imports no library, so that the command line can check a value before it loads anything.
"""

from __future__ import annotations

from typing import Any

from vtc.errors import ConfigError
from vtc.plain import integer, real, shown

__all__ = [
    "MAX_DRAWN_PIXELS",
    "MAX_FPS",
    "MAX_FRAMES",
    "MAX_NEW_TOKENS",
    "MAX_PANEL",
    "MAX_PIXELS",
    "MAX_ROUNDS",
    "MIN_PANEL",
    "check_count",
    "check_fps",
]

MAX_PIXELS = 89_478_485
"""Width times height of a picture that is read; the number above which pillow warns of a decompression bomb."""

MIN_PANEL, MAX_PANEL = 16, 4096
"""Longer edge in pixels of one panel that is drawn; at 4096 drawing it takes about 2 GB of memory."""

MAX_DRAWN_PIXELS = 2**28
"""Pixels of all panels of a drawing together, which take 3 or 4 bytes each."""

MAX_NEW_TOKENS = 100_000
"""Tokens of one answer."""

MAX_ROUNDS = 10_000
"""Timed or tried repetitions of one thing."""

MAX_FRAMES = 100_000
"""Frames asked for by number, of a video or of one window: at one per second, 28 hours."""

MAX_FPS = 1000.0
"""Frames per second."""


def check_count(name: str, value: Any, most: int, *, least: int = 1) -> None:
    """Raise unless `value` is a whole number from `least` to `most`.

    Raises
    ------
    ConfigError
        It is not; the message says `name`, the limits and what was given.
    """
    count = integer(value)
    if count is None or not least <= count <= most:
        raise ConfigError(f"{name} must be an integer from {least:,} to {most:,}, got {shown(value)}.")


def check_fps(value: Any) -> None:
    """Raise unless `value` is a number of frames per second above 0 and up to `MAX_FPS`.

    Raises
    ------
    ConfigError
        It is not.
    """
    if not 0 < (real(value) or 0) <= MAX_FPS:
        raise ConfigError(f"fps must be positive, and at most {MAX_FPS:,g} frames per second, got {shown(value)}.")
