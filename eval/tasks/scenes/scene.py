"""Scenes: the layout of objects, its drawing, and the patches that each object covers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eval.tasks.scenes import objects, sources
from eval.tasks.scenes.sources import Split
from eval.tasks.scenes.vocabulary import (
    CANVAS,
    COLOURS,
    DIGIT_SHAPES,
    DIGITS,
    DISTRACTORS,
    GRID,
    NUMBERS,
    PATCH,
    SHAPES,
    SIGN_COLOURS,
    WORDS,
)

_GAP = 4  # pixels between any two objects
_OBJECT_COUNTS = ((1, 0.06), (2, 0.18), (3, 0.26), (4, 0.24), (5, 0.16), (6, 0.10))
_MIN_COVERAGE = 0.3  # share of a patch that an object must fill for the patch to be counted as its own


@dataclass(frozen=True)
class Thing:
    """One object, sign or distractor in a scene.

    Attributes
    ----------
    role : str
        ``"object"`` (coloured shape), ``"sign"`` (plate with a word or number) or ``"distractor"``.
    name : str
        Shape of an object or distractor, ``"sign"`` for a sign.
    colour : str
        Colour name; empty for distractors.
    text : str
        The digit on an object, the writing on a sign, or empty.
    box : tuple of int
        ``(left, top, width, height)`` in pixels.
    patches : tuple of int
        Row-major indices of the patches that it covers, largest share first; never empty.
    """

    role: str
    name: str
    colour: str
    text: str
    box: tuple[int, int, int, int]
    patches: tuple[int, ...]

    @property
    def centre(self) -> tuple[float, float]:
        """The centre ``(x, y)`` in pixels."""
        left, top, width, height = self.box
        return left + width / 2, top + height / 2


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawn scene: ``image (CANVAS, CANVAS, 3)`` uint8 and the things in it."""

    image: NDArray[np.uint8]
    things: tuple[Thing, ...]
    split: Split
    seed: int
    index: int
    objects: tuple[Thing, ...] = field(init=False)
    signs: tuple[Thing, ...] = field(init=False)
    distractors: tuple[Thing, ...] = field(init=False)

    def __post_init__(self) -> None:
        for attribute, role in (("objects", "object"), ("signs", "sign"), ("distractors", "distractor")):
            object.__setattr__(self, attribute, tuple(t for t in self.things if t.role == role))

    @property
    def named(self) -> tuple[Thing, ...]:
        """Objects and signs, which questions may name."""
        return self.objects + self.signs


def rng_for(split: Split, seed: int, index: int, purpose: int = 0) -> np.random.Generator:
    """Return the generator of one scene; it depends on the arguments alone, so scenes can be drawn in any order."""
    return np.random.default_rng([sources.SPLITS.index(split), seed, index, purpose])


def make_scene(split: Split, seed: int, index: int) -> Scene:
    """Draw scene ``index`` of the split.

    Objects have different colours, so that a colour names exactly one of them; shapes may repeat. Between none and
    two signs (one white, one black) carry a word or a number. Up to five distractors are added where there is space.

    Parameters
    ----------
    split : {"train", "test"}
        Decides photographs, digit images and fonts, which the two splits do not share, and the layouts.
    seed, index : int
        Which scene; equal arguments give equal pixels.
    """
    rng = rng_for(split, seed, index)
    canvas = sources.background(split, CANVAS, rng)
    layout = _Layout(canvas, rng)
    fonts = sources.fonts(split)

    counts, weights = zip(*_OBJECT_COUNTS, strict=True)
    n_objects = int(rng.choice(counts, p=weights))
    colours = list(rng.permutation(list(COLOURS))[:n_objects])
    sign_colours = list(rng.permutation(list(SIGN_COLOURS))[: int(rng.choice(3, p=(0.20, 0.68, 0.12)))])
    n_digits = int(rng.choice(3, p=(0.25, 0.60, 0.15)))

    for colour in sign_colours:  # the widest first: they are the hardest to place
        _add_sign(layout, str(colour), fonts, rng)
    digits = sources.handwritten(split)
    for number, colour in enumerate(colours):
        _add_object(layout, str(colour), digits if number < n_digits else None, rng)
    for _ in range(int(rng.integers(0, 6))):
        _add_distractor(layout, fonts, rng)

    noise = rng.normal(0.0, rng.uniform(0.0, 5.0), canvas.shape)
    image = np.clip(canvas + noise, 0, 255).astype(np.uint8)
    return Scene(image=image, things=tuple(layout.things), split=split, seed=seed, index=index)


class _Layout:
    """A canvas with the boxes of what has been drawn, for placing further things without overlap."""

    def __init__(self, canvas: NDArray[np.float32], rng: np.random.Generator) -> None:
        self.canvas = canvas
        self.rng = rng
        self.things: list[Thing] = []

    def free_position(self, width: int, height: int, attempts: int = 60) -> tuple[int, int] | None:
        """Return a random free ``(left, top)``, or None if none was found."""
        for _ in range(attempts):
            left = int(self.rng.integers(2, CANVAS - width - 1))
            top = int(self.rng.integers(2, CANVAS - height - 1))
            if all(_apart((left, top, width, height), thing.box) for thing in self.things):
                return left, top
        return None

    def draw(
        self, thing: tuple[str, str, str, str], picture: objects.Array, alpha: objects.Array, at: tuple[int, int]
    ) -> None:
        """Draw a thing (role, name, colour, text) with its upper left corner ``at`` a position, and record its box."""
        left, top = at
        objects.paste(self.canvas, picture, alpha, top, left)
        height, width = alpha.shape
        self.things.append(Thing(*thing, box=(left, top, width, height), patches=covered_patches(alpha, left, top)))


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return (
        a[0] + a[2] + _GAP <= b[0]
        or b[0] + b[2] + _GAP <= a[0]
        or a[1] + a[3] + _GAP <= b[1]
        or b[1] + b[3] + _GAP <= a[1]
    )


def covered_patches(alpha: NDArray[np.float32], left: int, top: int) -> tuple[int, ...]:
    """Return the patches that ``alpha (h, w)`` at ``(left, top)`` fills by at least 30 %, or else the fullest one."""
    full = np.zeros((CANVAS, CANVAS), np.float32)
    full[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha
    share = full.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).ravel()
    order = np.argsort(-share, kind="stable")
    count = max(1, int((share >= _MIN_COVERAGE).sum()))
    return tuple(int(i) for i in order[:count])


def _add_object(
    layout: _Layout, colour: str, digits: tuple[NDArray[np.float64], ...] | None, rng: np.random.Generator
) -> None:
    """Add an object, with a handwritten digit on it if ``digits`` are given."""
    shape = str(rng.choice(SHAPES if digits is None else DIGIT_SHAPES))
    size = int(rng.integers(26, 51)) if digits is None else int(rng.integers(58, 79))
    at = layout.free_position(size, size)
    if at is None:
        return  # no space: the scene has one object fewer
    paint = objects.jittered(colour, rng)
    picture = np.broadcast_to(paint, (size, size, 3)).copy()
    text = ""
    if digits is not None:
        text = str(rng.choice(DIGITS))
        examples = digits[int(text)]
        ink_size = int(size * (0.78 if shape == "square" else 0.68))
        ink = objects.digit_mask(examples[int(rng.integers(len(examples)))], ink_size)
        offset = (size - ink_size) // 2
        objects.paste(picture, objects.ink_for(paint), ink, offset, offset)
    layout.draw(("object", shape, colour, text), picture, objects.shape_mask(shape, size), at)


def _add_sign(layout: _Layout, colour: str, fonts: tuple[str | None, ...], rng: np.random.Generator) -> None:
    text = str(rng.choice(WORDS if rng.random() < 0.65 else NUMBERS))
    font = fonts[int(rng.integers(len(fonts)))]
    plate = objects.sign(text, font, int(rng.integers(25, 31)), objects.jittered(colour, rng, 10))
    at = layout.free_position(plate.shape[1], plate.shape[0])
    if at is not None:
        layout.draw(("sign", "sign", colour, text), plate, np.ones(plate.shape[:2], np.float32), at)


def _add_distractor(layout: _Layout, fonts: tuple[str | None, ...], rng: np.random.Generator) -> None:
    kind = str(rng.choice(DISTRACTORS))
    size = int(rng.integers(20, 45))
    at = layout.free_position(size, size)
    if at is not None:
        picture, alpha = objects.distractor(kind, size, fonts[int(rng.integers(len(fonts)))], rng)
        layout.draw(("distractor", kind, "", ""), picture, alpha, at)
