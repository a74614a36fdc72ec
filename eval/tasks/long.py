"""Long clips: 64 to 256 frames of a photograph on which little happens, seldom and briefly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from eval.tasks.base import Sample, Truth, register_task
from eval.tasks.generated import Generated, about
from eval.tasks.video import Frames
from vtc import ConfigError

if TYPE_CHECKING:
    from eval.tasks.clips.clip import Actor, Clip
    from eval.tasks.scenes.questions import Question
    from eval.tasks.scenes.sources import Split

LENGTHS: Final = (64, 128, 256)
"""Numbers of frames; clips take turns."""

KINDS: Final = ("order", "when", "colour", "shape", "before", "times")
"""Kinds of question. The reference models were taught the first four, on short clips."""

BRIEF: Final = (4, 6, 8)
"""Frames for which an object is seen."""

NUMBERS: Final = (2, 3, 4)
"""Numbers of objects."""

REPEATS: Final = (1, 2, 3)
"""How often one of the objects is seen."""

_LAYOUT_PURPOSE: Final = 30_000
_QUESTION_PURPOSE: Final = 30_001


@register_task
@dataclass(frozen=True)
class LongClipsTask(Generated):
    """Asks about shapes that each appear for one to two seconds of a clip of 16 to 64.

    ``order``, ``when``, ``colour`` and ``shape`` are asked as in the task ``clips``. ``before`` asks whether one object
    appears before or after another, ``times`` how often one of them appears. All frames are shown.

    Attributes
    ----------
    pictures : int
        Number of clips.
    per_picture : int
        Maximum number of questions about each.
    seed : int
        Each seed draws other clips of the held-out split.
    frames : int or None
        Length of every clip; by default 64, 128 and 256 in turn.
    """

    name = "long-clips"
    modality = "video"
    source = "drawn by eval/tasks/clips"

    pictures: int = 60
    per_picture: int = 6
    seed: int = 0
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames not in LENGTHS:
            raise ConfigError(f"frames of long-clips: expected one of {LENGTHS}, got {self.frames}")

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        found: list[Sample] = []
        for index in range(self.pictures):
            clip = _clip(self.seed, index, self.frames)
            frames = functools.partial(_frames, self.seed, index, self.frames)
            asked = ask(clip, self.per_picture)
            found += about(f"long-{index}", asked, video=frames, index=index, frames=clip.length)
        return found

    def truth(self, sample: Sample) -> Truth:
        """List the cells of each object, all its appearances together."""
        from eval.tasks.clips.clip import SIDE, cells

        index = int(sample.meta["index"])
        clip, side = _clip(self.seed, index, self.frames), SIDE // 14
        colours = dict.fromkeys(actor.colour for actor in clip.objects)
        things = tuple(
            tuple(cell for actor in clip.objects if actor.colour == colour for cell in cells(actor, clip.length))
            for colour in colours
        )
        return Truth(things, (clip.length // 2, side, side), (self.seed, index))


def make_long_clip(seed: int, index: int, split: Split = "test", frames: int | None = None) -> Clip:
    """Draw clip ``index`` of the held-out split, or of the other one; :data:`LENGTHS` take turns unless told otherwise.

    Objects have different colours, stand still and are seen one at a time, each for 4, 6 or 8 frames; one of them up to
    three times. Equal arguments give equal frames.
    """
    from eval.tasks.clips.clip import SIDE, Clip, draw, place, rng_for
    from eval.tasks.scenes import sources
    from eval.tasks.scenes.vocabulary import COLOURS, SHAPES

    rng = rng_for(split, seed, index, _LAYOUT_PURPOSE)
    length = frames or LENGTHS[index % len(LENGTHS)]
    background = sources.background(split, SIDE, rng)
    count = int(rng.choice(NUMBERS))
    again = int(rng.choice(REPEATS)) - 1
    # Windows of equal length keep appearances apart; each starts on an even frame, as models join frames in pairs.
    windows = rng.permutation(count + again)
    wide = length // len(windows) // 2 * 2
    swept: list[tuple[int, int, int, int]] = []
    actors: list[Actor] = []
    for number, colour in enumerate(rng.permutation(list(COLOURS))[:count]):
        actor = place("object", str(rng.choice(SHAPES)), str(colour), int(rng.integers(26, 39)), length, swept, rng)
        if actor is None:
            continue
        for window in (windows[number], *(windows[count:] if number == 0 else ())):
            first, last = span(int(window), wide, rng)
            actors.append(dataclasses.replace(actor, stop=actor.start, direction="", first=first, last=last))
    return Clip(draw(background, actors, length, split, rng), tuple(actors), length, split, seed, index)


def span(window: int, wide: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the first frame of an appearance and the one behind its last, in a window of ``wide`` frames, at least 6."""
    brief = int(rng.choice([frames for frames in BRIEF if frames < wide]))
    first = window * wide + 2 * int(rng.integers(1, (wide - brief) // 2 + 1))
    return first, first + brief


def ask(clip: Clip, count: int, kinds: Sequence[str] = KINDS) -> tuple[Question, ...]:
    """Return up to ``count`` questions about a long clip, in turn of each kind, in a random order of kinds.

    "How many times" is asked where something appears more than once, and more often about that than about the others,
    so that none of 1, 2 and 3 is right in more than about 40 % of the cases.
    """
    from eval.tasks.clips.clip import rng_for

    rng = rng_for(clip.split, clip.seed, clip.index, _QUESTION_PURPOSE)
    order = [kinds[int(i)] for i in rng.permutation(len(kinds))]
    found: dict[str, Question] = {}
    for turn in range(3 * max(count, len(kinds))):
        question = _ask(clip, order[turn % len(order)], rng)
        if question is not None and len(found) < count:
            found.setdefault(question.text, question)
    return tuple(found.values())


def _ask(clip: Clip, kind: str, rng: np.random.Generator) -> Question | None:
    """Return a question of a kind; None if the clip allows none."""
    from eval.tasks.clips.questions import TIMES, part_of
    from eval.tasks.scenes.questions import Question
    from eval.tasks.scenes.vocabulary import COLOURS, COUNTS, SHAPES

    seen: dict[str, list[Actor]] = {}
    for actor in clip.objects:
        seen.setdefault(actor.colour, []).append(actor)
    once = [actors[0] for actors in seen.values() if len(actors) == 1]
    one = clip.objects[int(rng.integers(len(clip.objects)))]
    where = (clip.actors.index(one),)
    if kind == "shape":
        return Question(kind, f"What shape is the {one.colour} object?", one.name, where, SHAPES, where)
    if kind == "colour":
        if sum(actors[0].name == one.name for actors in seen.values()) > 1:
            return None
        return Question(kind, f"What colour is the {one.name}?", one.colour, where, tuple(COLOURS), where)
    if kind == "times":
        again = [actors[0] for actors in seen.values() if len(actors) > 1]
        if not again or not once:
            return None
        among = again if rng.random() < 2 / 3 else once
        one = among[int(rng.integers(len(among)))]
        own = tuple(clip.actors.index(actor) for actor in seen[one.colour])
        text = f"How many times does the {one.colour} {one.name} appear?"
        return Question(kind, text, str(len(own)), own, COUNTS, own)
    if kind == "when":
        if one not in once:
            return None
        text = f"When does the {one.colour} {one.name} appear?"
        return Question(kind, text, part_of(one.first, clip.length), where, TIMES, where)
    if len(once) < 2:
        return None
    first, second = (once[int(i)] for i in rng.permutation(len(once))[:2])
    both = (clip.actors.index(first), clip.actors.index(second))
    earlier = first if first.first < second.first else second
    if kind == "order":
        text = f"Which colour appears first, {first.colour} or {second.colour}?"
        return Question(kind, text, earlier.colour, both, tuple(COLOURS), (clip.actors.index(earlier),))
    text = f"Does the {first.colour} {first.name} appear before or after the {second.colour} {second.name}?"
    return Question(kind, text, "before" if earlier is first else "after", both, ("before", "after"), both)


@functools.lru_cache(maxsize=8)
def _clip(seed: int, index: int, frames: int | None) -> Any:
    return make_long_clip(seed, index, frames=frames)


def _frames(seed: int, index: int, frames: int | None) -> Frames:
    from eval.tasks.clips.clip import FPS

    clip = _clip(seed, index, frames)
    return Frames(clip.frames, tuple(range(clip.length)), float(FPS), clip.length)
