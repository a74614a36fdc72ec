"""The closed vocabulary of the scenes: what can be drawn and named."""

from __future__ import annotations

from typing import Final

CANVAS: Final = 224
"""Side of a scene in pixels."""

PATCH: Final = 14
"""Side of a vision-tower patch in pixels; a scene has ``GRID x GRID`` patches."""

GRID: Final = CANVAS // PATCH

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 225),
    "yellow": (240, 220, 50),
    "purple": (150, 55, 190),
    "orange": (245, 135, 20),
    "cyan": (55, 210, 220),
}

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "cup")

DIGIT_SHAPES: Final = ("circle", "square")
"""Shapes large enough inside for a handwritten digit."""

DIGITS: Final = tuple("0123456789")

WORDS: Final = (
    "open", "exit", "stop", "taxi", "cafe", "milk", "bank", "fish", "gold", "jazz", "moon", "wind",
)  # fmt: skip

NUMBERS: Final = ("12", "37", "48", "53", "69", "86")

SIGN_COLOURS: Final[dict[str, tuple[int, int, int]]] = {"white": (242, 242, 238), "black": (24, 24, 26)}

COUNTS: Final = tuple(str(i) for i in range(8))

PLACES: Final = ("top left", "top right", "bottom left", "bottom right")

DISTRACTORS: Final = ("cross", "ring", "checker", "stripes", "print")
"""Salient things that no question names."""

KINDS: Final = ("exist", "colour", "shape", "place", "relation", "extreme", "count", "digit", "reading")
"""Kinds of question, in the order in which tables list them."""
