"""Draw crowded crops with a class per patch: what the ``qwen2_5_vl`` tower is trained on.

A crop is small and full of things, so that a second of training shows the tower far more objects than whole scenes
would. It spans two frames; in half of the crops things move between them, and the tower learns directions of motion.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from eval.reference.train.labels import ATTRIBUTES
from eval.tasks.clips.clip import DIRECTIONS
from eval.tasks.scenes import objects, sources
from eval.tasks.scenes.sources import Split
from eval.tasks.scenes.vocabulary import COLOURS, DIGIT_SHAPES, DIGITS, NUMBERS, PATCH, SHAPES, SIGN_COLOURS, WORDS

EXTRA_FONTS: Final = (
    "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf", "DejaVuSansMono.ttf", "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf", "STIXGeneralBolIta.ttf", "cmr10.ttf",
)  # fmt: skip
"""Further training fonts (none of them a test font): a tower needs more variety than seven."""

_OWNED = 0.3  # share of a patch that a thing must cover to own it


@lru_cache(maxsize=2)
def _fonts(split: Split) -> tuple[str | None, ...]:
    known = sources.fonts(split)
    if split == "test":
        return known
    folder = str(known[0]).rpartition("/")[0]
    return (*known, *(f"{folder}/{name}" for name in EXTRA_FONTS))


class _Canvas:
    """Two frames, the classes of their patches, and the boxes that are taken."""

    def __init__(self, side: int, split: Split, rng: np.random.Generator) -> None:
        self.side, self.split, self.rng = side, split, rng
        first = sources.background(split, side, rng)
        self.frames = [first, first.copy()]
        self.labels = np.zeros((len(ATTRIBUTES), side // PATCH, side // PATCH), np.int64)
        self.boxes: list[tuple[int, int, int, int]] = []

    def place(self, width: int, height: int) -> tuple[int, int] | None:
        """Reserve a free box; returns ``(left, top)``, or None if none was found."""
        for _ in range(12):
            left = int(self.rng.integers(0, self.side - width + 1))
            top = int(self.rng.integers(0, self.side - height + 1))
            if all(
                left + width + 2 <= x or x + w + 2 <= left or top + height + 2 <= y or y + h + 2 <= top
                for x, y, w, h in self.boxes
            ):
                self.boxes.append((left, top, width, height))
                return left, top
        return None

    def font(self) -> str | None:
        fonts = _fonts(self.split)
        return fonts[int(self.rng.integers(len(fonts)))]

    def covered(self, alpha: objects.Array, left: int, top: int) -> NDArray[np.bool_]:
        """Which patches a thing with this mask covers by at least 30 %."""
        full = np.zeros((self.side, self.side), np.float32)
        full[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha
        count = self.side // PATCH
        owned: NDArray[np.bool_] = full.reshape(count, PATCH, count, PATCH).mean((1, 3)) >= _OWNED
        return owned

    def label(self, owned: NDArray[np.bool_], **names: str) -> None:
        for row, (attribute, words) in enumerate(ATTRIBUTES.items()):
            if names.get(attribute):
                self.labels[row][owned] = words.index(names[attribute]) + 1


def _object(canvas: _Canvas, moving: bool) -> None:
    rng = canvas.rng
    shape = str(rng.choice(SHAPES))
    with_digit = not moving and shape in DIGIT_SHAPES and rng.random() < 0.8
    size = int(rng.integers(54, 80)) if with_digit else int(rng.integers(23, 42) if moving else rng.integers(24, 52))
    direction = str(rng.choice(list(DIRECTIONS))) if moving and rng.random() < 0.75 else ""
    step_x, step_y = (0, 0)
    if direction:
        pixels = int(rng.integers(1, 8))
        step_x, step_y = (pixels * s for s in DIRECTIONS[direction])
    at = canvas.place(size + abs(step_x), size + abs(step_y))
    if at is None:
        return
    left, top = at[0] + max(0, -step_x), at[1] + max(0, -step_y)
    colour = str(rng.choice(list(COLOURS)))
    paint = objects.jittered(colour, rng, 18)
    picture = np.broadcast_to(paint, (size, size, 3)).copy()
    text = ""
    if with_digit:
        text = str(rng.choice(DIGITS))
        examples = sources.handwritten(canvas.split)[int(text)]
        ink_size = int(size * rng.uniform(0.6, 0.82 if shape == "square" else 0.7))
        ink = objects.digit_mask(examples[int(rng.integers(len(examples)))], ink_size)
        offset = (size - ink_size) // 2
        objects.paste(picture, objects.ink_for(paint), ink, offset, offset)
    alpha = objects.shape_mask(shape, size)
    owned = np.zeros_like(canvas.labels[0], bool)
    once = moving and not direction and rng.random() < 0.1  # visible in the second frame only
    for time in (1,) if once else (0, 1):
        at_x, at_y = left + time * step_x, top + time * step_y
        objects.paste(canvas.frames[time], picture, alpha, at_y, at_x)
        owned |= canvas.covered(alpha, at_x, at_y)
    canvas.label(owned, colour=colour, shape=shape, text=text, motion=direction)


def _sign(canvas: _Canvas) -> None:
    rng = canvas.rng
    text = str(rng.choice(WORDS if rng.random() < 0.65 else NUMBERS))
    colour = str(rng.choice(list(SIGN_COLOURS)))
    plate = objects.sign(text, canvas.font(), int(rng.integers(23, 33)), objects.jittered(colour, rng, 12))
    height, width = plate.shape[:2]
    if max(width, height) > canvas.side or (at := canvas.place(width, height)) is None:
        return
    alpha = np.ones((height, width), np.float32)
    for frame in canvas.frames:
        objects.paste(frame, plate, alpha, at[1], at[0])
    canvas.label(canvas.covered(alpha, *at), colour=colour, shape="sign", text=text)


def _distractor(canvas: _Canvas, moving: bool) -> None:
    rng = canvas.rng
    kind = str(rng.choice(("cross", "ring", "checker", "stripes", "print")))
    size = int(rng.integers(14, 36))
    at = canvas.place(size, size)
    if at is None:
        return
    picture, alpha = objects.distractor(kind, size, canvas.font(), rng)
    shift = int(rng.integers(-1, 2)) if moving else 0
    for time, frame in enumerate(canvas.frames):
        objects.paste(frame, picture, alpha, at[1], min(max(0, at[0] + time * shift), canvas.side - size))


def _halve_chroma(frame: objects.Array) -> objects.Array:
    """Halve the resolution of the colour, as video coding does."""
    grey = frame @ np.asarray((0.299, 0.587, 0.114), np.float32)
    colour = frame - grey[..., None]
    half = colour.reshape(colour.shape[0] // 2, 2, colour.shape[1] // 2, 2, 3).mean((1, 3))
    return grey[..., None] + half.repeat(2, 0).repeat(2, 1)


def make_crop(
    side: int, moving: bool, rng: np.random.Generator, split: Split = "train"
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw one crop from the photographs, digits and fonts of a split.

    A ``moving`` crop has small objects without digits, most of them moving, instead of signs, digits and large objects
    at rest. Returns frames ``(2, side, side, 3)`` and a class per attribute and patch, ``(4, side / 14, side / 14)``.
    """
    canvas = _Canvas(side, split, rng)
    for _ in range(int(rng.integers(2, 5 + (side // 56) ** 2))):
        draw = rng.random()
        if draw < 0.2:
            _distractor(canvas, moving)
        elif draw < 0.5 and not moving:
            _sign(canvas)
        else:
            _object(canvas, moving)
    frames = canvas.frames
    if moving and rng.random() < 0.7:
        frames = [_halve_chroma(frame) for frame in frames]
    spread = np.float32(rng.uniform(0.0, 5.0))
    noise = spread * rng.standard_normal(frames[0].shape, np.float32)
    again = spread * rng.standard_normal(frames[0].shape, np.float32) if moving else noise
    pair = np.stack([frames[0] + noise, frames[1] + again])
    return np.clip(pair, 0, 255).astype(np.uint8), canvas.labels
