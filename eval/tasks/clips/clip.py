"""Clips: shapes that move, appear and disappear over a photograph, drawn frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from eval.tasks.scenes import objects, sources
from eval.tasks.scenes.sources import Split
from eval.tasks.scenes.vocabulary import COLOURS, DISTRACTORS, SHAPES

SIDE: Final = 112
"""Side of a frame in pixels."""

FPS: Final = 4
"""Frames a second. Models that join two frames into one token get two tokens a second."""

LENGTHS: Final = (8, 12, 16)
"""Possible numbers of frames."""

DIRECTIONS: Final[dict[str, tuple[int, int]]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Direction words and their steps (x to the right, y downwards)."""

_CELL: Final = 14  # objects own the cells of this size that they cover by at least _OWNED
_OWNED: Final = 0.3
_GAP: Final = 2  # pixels between the areas that any two things sweep
_OBJECT_COUNTS: Final = ((2, 0.22), (3, 0.34), (4, 0.28), (5, 0.16))
_TRAVEL: Final = (20, 46)  # pixels from the first frame to the last
_PRESENCE: Final = {"always": 0.45, "appears": 0.32, "disappears": 0.23}


@dataclass(frozen=True)
class Actor:
    """One object in a clip.

    Attributes
    ----------
    role : str
        ``"object"`` (coloured shape that questions may name) or ``"distractor"`` (never named).
    name, colour : str
        Shape and colour name; a distractor has no colour.
    size : int
        Side in pixels.
    start, stop : tuple of int
        Upper left corner in the clip's first and last frame, with linear motion between them; equal if it is static.
    direction : str
        Word for its motion, empty if it is static.
    first, last : int
        It is visible in the frames ``first <= frame < last``.
    """

    role: str
    name: str
    colour: str
    size: int
    start: tuple[int, int]
    stop: tuple[int, int]
    direction: str
    first: int
    last: int

    def corner(self, frame: int, frames: int) -> tuple[int, int]:
        """Return the upper left corner ``(left, top)`` in a frame of a clip of ``frames`` frames."""
        share = frame / (frames - 1)
        left, top = (round(a + share * (b - a)) for a, b in zip(self.start, self.stop, strict=True))
        return left, top

    def visible(self, frame: int) -> bool:
        """Return whether it is visible in that frame."""
        return self.first <= frame < self.last


@dataclass(frozen=True, eq=False)
class Clip:
    """A drawn clip: ``frames (T, SIDE, SIDE, 3)`` uint8 and the objects in it."""

    frames: NDArray[np.uint8]
    actors: tuple[Actor, ...]
    length: int
    split: Split
    seed: int
    index: int

    @property
    def objects(self) -> tuple[Actor, ...]:
        """The coloured shapes, which questions may name."""
        return tuple(actor for actor in self.actors if actor.role == "object")


def rng_for(split: Split, seed: int, index: int, purpose: int = 0) -> np.random.Generator:
    """Return the generator of one clip; it depends on the arguments alone, so clips can be drawn in any order."""
    return np.random.default_rng([2, sources.SPLITS.index(split), seed, index, purpose])


def make_clip(split: Split, seed: int, index: int, lengths: Sequence[int] = LENGTHS) -> Clip:
    """Draw clip ``index`` of the split.

    Objects have different colours, so that a colour names exactly one of them; shapes may repeat. Two in five move;
    more than half appear or disappear, always between two tokens of a model that joins frames in pairs. Grey
    distractors do the same; no question names them.

    Parameters
    ----------
    split : {"train", "test"}
        Decides the photographs, which the two splits do not share, and the layouts.
    seed, index : int
        Which clip; equal arguments give equal frames.
    lengths : sequence of int
        Numbers of frames to choose from.
    """
    rng = rng_for(split, seed, index)
    length = int(lengths[int(rng.integers(len(lengths)))])
    background = sources.background(split, SIDE, rng)
    swept: list[tuple[int, int, int, int]] = []
    actors: list[Actor] = []

    counts, weights = zip(*_OBJECT_COUNTS, strict=True)
    for colour in rng.permutation(list(COLOURS))[: int(rng.choice(counts, p=weights))]:
        actor = place("object", str(rng.choice(SHAPES)), str(colour), int(rng.integers(26, 39)), length, swept, rng)
        if actor is not None:
            actors.append(actor)
    for _ in range(int(rng.integers(0, 3))):
        actor = place("distractor", str(rng.choice(DISTRACTORS)), "", int(rng.integers(14, 29)), length, swept, rng)
        if actor is not None:
            actors.append(actor)
    frames = draw(background, actors, length, split, rng)
    return Clip(frames, tuple(actors), length, split, seed, index)


def place(
    role: str,
    name: str,
    colour: str,
    size: int,
    length: int,
    swept: list[tuple[int, int, int, int]],
    rng: np.random.Generator,
) -> Actor | None:
    """Return an actor whose whole path is apart from the others', or None if no position was found.

    Parameters
    ----------
    role, name, colour : str
        As in :class:`Actor`.
    size : int
        Side in pixels.
    length : int
        Frames of the clip.
    swept : list of (left, top, width, height)
        Areas that are taken; the new one is appended.
    rng : Generator
        Decides about place, motion and presence.
    """
    for _ in range(40):
        direction = str(rng.choice(list(DIRECTIONS))) if rng.random() < 0.45 else ""
        travel = int(rng.integers(*_TRAVEL)) if direction else 0
        step_x, step_y = DIRECTIONS[direction] if direction else (0, 0)
        width, height = size + abs(step_x) * travel, size + abs(step_y) * travel
        left, top = int(rng.integers(0, SIDE - width + 1)), int(rng.integers(0, SIDE - height + 1))
        if all(
            left + width + _GAP <= x or x + w + _GAP <= left or top + height + _GAP <= y or y + h + _GAP <= top
            for x, y, w, h in swept
        ):
            break
    else:
        return None
    swept.append((left, top, width, height))
    start = left + travel * (step_x < 0), top + travel * (step_y < 0)
    stop = start[0] + step_x * travel, start[1] + step_y * travel
    presence = str(rng.choice(list(_PRESENCE), p=list(_PRESENCE.values())))
    event = 2 * int(rng.integers(1, length // 2))
    first = event if presence == "appears" else 0
    last = event if presence == "disappears" else length
    return Actor(role, name, colour, size, start, stop, direction, first, last)


@lru_cache(maxsize=1024)
def _mask(shape: str, size: int) -> objects.Array:
    return objects.shape_mask(shape, size)


def draw(
    background: objects.Array, actors: Sequence[Actor], length: int, split: Split, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Return the ``(length, SIDE, SIDE, 3)`` frames of the actors that are visible, with noise."""
    fonts = sources.fonts(split)
    looks: list[tuple[objects.Array, objects.Array]] = []
    for actor in actors:
        if actor.role == "object":
            looks.append((objects.jittered(actor.colour, rng), _mask(actor.name, actor.size)))
        else:
            looks.append(objects.distractor(actor.name, actor.size, fonts[int(rng.integers(len(fonts)))], rng))
    frames = np.repeat(background[None], length, 0)
    for time in range(length):
        for actor, (picture, alpha) in zip(actors, looks, strict=True):
            if actor.visible(time):
                left, top = actor.corner(time, length)
                objects.paste(frames[time], picture, alpha, top, left)
    frames += np.float32(rng.uniform(0.0, 4.0)) * rng.standard_normal(frames.shape, np.float32)
    return np.clip(frames, 0, 255).astype(np.uint8)


def cells(actor: Actor, length: int) -> tuple[int, ...]:
    """Return the cells of 14 x 14 pixels and two frames that an actor covers by at least 30 % in either frame.

    Returns
    -------
    tuple of int
        Indices into the ``(length / 2, 8, 8)`` grid of cells in time-major order: the visual tokens of the
        ``qwen2_5_vl`` reference model that show the object.
    """
    side = SIDE // _CELL
    alpha = _mask(actor.name, actor.size) if actor.role == "object" else np.ones((actor.size, actor.size), np.float32)
    owned = np.zeros((length // 2, side, side), bool)
    for time in range(length):
        if actor.visible(time):
            left, top = actor.corner(time, length)
            full = np.zeros((SIDE, SIDE), np.float32)
            full[top : top + actor.size, left : left + actor.size] = alpha
            owned[time // 2] |= full.reshape(side, _CELL, side, _CELL).mean((1, 3)) >= _OWNED
    return tuple(int(i) for i in np.flatnonzero(owned))
