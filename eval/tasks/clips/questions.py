"""Questions about a clip, in English, each with exactly one right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from eval.tasks.clips.clip import DIRECTIONS, Actor, Clip, rng_for
from eval.tasks.scenes.questions import Question
from eval.tasks.scenes.vocabulary import COLOURS, COUNTS, SHAPES

KINDS: Final = ("motion", "order", "change", "when", "count", "colour", "shape")
"""Kinds of question, in the order in which tables list them; the last two need no motion.

There is one more, "describe", which is asked on request only.
"""

TIMES: Final = ("start", "middle", "end")
"""Answers to "when": the first 40 % of the frames, the 20 % between, the last 40 %."""

_QUESTION_PURPOSE: Final = 1  # keeps the generator of questions apart from the generator of frames


def part_of(frame: int, length: int) -> str:
    """Return the word of :data:`TIMES` for an event at ``frame`` of a clip of ``length`` frames."""
    share = frame / length
    return "start" if share < 0.4 else "middle" if share <= 0.6 else "end"


class _Asker:
    """Generates questions about one clip; an ``_ask_*`` method returns None if the clip allows none of its kind."""

    def __init__(self, clip: Clip, rng: np.random.Generator) -> None:
        self.clip = clip
        self.rng = rng
        self.objects = clip.objects

    def ask(self, kind: str) -> Question | None:
        asker: Callable[[], Question | None] = getattr(self, f"_ask_{kind}")
        return asker()

    def _pick(self, items: Sequence[str]) -> str:
        return items[int(self.rng.integers(len(items)))]

    def _one(self, actors: Sequence[Actor]) -> Actor:
        return actors[int(self.rng.integers(len(actors)))]

    def _index(self, *actors: Actor) -> tuple[int, ...]:
        return tuple(self.clip.actors.index(actor) for actor in actors)

    def _unique_shape(self, actor: Actor) -> bool:
        return sum(other.name == actor.name for other in self.objects) == 1

    def _refer(self, actor: Actor) -> str:
        """Return a definite description that fits this object alone (colours are unique in a clip)."""
        draw = self.rng.random()
        if draw < 0.3 and self._unique_shape(actor):
            return f"the {actor.name}"
        if draw < 0.5:
            return f"the {actor.colour} object"
        return f"the {actor.colour} {actor.name}"

    def _ask_motion(self) -> Question | None:
        movers = [actor for actor in self.objects if actor.direction]
        if not movers:
            return None
        target = self._one(movers)
        text = self._pick(("Which way does {0} move?", "In which direction does {0} move?")).format(self._refer(target))
        return Question("motion", text, target.direction, self._index(target), tuple(DIRECTIONS), self._index(target))

    def _ask_order(self) -> Question | None:
        event = self._pick(("appears", "disappears"))
        time = {actor: actor.first if event == "appears" else actor.last for actor in self.objects}
        pairs = [(a, b) for a in self.objects for b in self.objects if time[a] < time[b]]
        if event == "disappears":  # an object that stays until the end does not disappear last
            pairs = [(a, b) for a, b in pairs if time[b] < self.clip.length]
        if not pairs:
            return None
        early, late = pairs[int(self.rng.integers(len(pairs)))]
        named = (early, late) if self.rng.random() < 0.5 else (late, early)
        text = self._pick(("Which colour {0} first, {1} or {2}?", "Which color {0} first, {1} or {2}?")).format(
            event, named[0].colour, named[1].colour
        )
        return Question("order", text, early.colour, self._index(early, late), tuple(COLOURS), self._index(early))

    def _ask_change(self) -> Question | None:
        appearing = [actor for actor in self.objects if actor.first > 0]
        disappearing = [actor for actor in self.objects if actor.last < self.clip.length]
        choices = [
            (word, who[0]) for word, who in (("appears", appearing), ("disappears", disappearing)) if len(who) == 1
        ]
        if not choices:
            return None
        event, target = choices[int(self.rng.integers(len(choices)))]
        everything = self._index(*self.objects)
        if self.rng.random() < 0.6:
            text = self._pick(("What colour is the object that {0}?", "What color is the object that {0}?")).format(
                event
            )
            return Question("change", text, target.colour, everything, tuple(COLOURS), self._index(target))
        text = self._pick(("What shape is the object that {0}?", "What is the shape of the object that {0}?")).format(
            event
        )
        return Question("change", text, target.name, everything, SHAPES, self._index(target))

    def _ask_when(self) -> Question | None:
        events = [("appear", actor, actor.first) for actor in self.objects if actor.first > 0]
        events += [("disappear", actor, actor.last) for actor in self.objects if actor.last < self.clip.length]
        if not events:
            return None
        verb, target, frame = events[int(self.rng.integers(len(events)))]
        text = f"When does {self._refer(target)} {verb}?"
        answer = part_of(frame, self.clip.length)
        return Question("when", text, answer, self._index(target), TIMES, self._index(target))

    def _ask_count(self) -> Question:
        when = self._pick(("all", "start", "end"))
        if when == "all":
            counted = self.objects
            text = self._pick(
                ("How many coloured objects does the clip show?", "How many colored objects does the video show?")
            )
        else:
            frame = 0 if when == "start" else self.clip.length - 1
            counted = tuple(actor for actor in self.objects if actor.visible(frame))
            text = self._pick(
                ("How many coloured objects are there at the {0}?", "How many colored objects do you see at the {0}?")
            )
        everything = self._index(*self.objects)
        return Question("count", text.format(when), str(len(counted)), everything, COUNTS, self._index(*counted))

    def _ask_colour(self) -> Question | None:
        candidates = [actor for actor in self.objects if self._unique_shape(actor)]
        if not candidates:
            return None
        target = self._one(candidates)
        text = self._pick(("What colour is the {0}?", "What color is the {0}?", "Which colour has the {0}?")).format(
            target.name
        )
        return Question("colour", text, target.colour, self._index(target), tuple(COLOURS), self._index(target))

    def _ask_shape(self) -> Question | None:
        if not self.objects:
            return None
        target = self._one(self.objects)
        text = self._pick(
            ("What shape is the {0} object?", "What is the shape of the {0} object?", "Which shape is {0}?")
        ).format(target.colour)
        return Question("shape", text, target.name, self._index(target), SHAPES, self._index(target))

    def _ask_describe(self) -> Question | None:
        """Ask for every object and what becomes of it, those that appear first at first, then from left to right."""
        actors = sorted(self.objects, key=lambda actor: (actor.first, actor.start[0]))
        if not actors:
            return None
        text = self._pick(("Describe the video.", "Describe all objects.", "What does the video show?"))
        answer = ", ".join(_described(actor, self.clip.length) for actor in actors) + "."
        return Question("describe", text, answer, self._index(*actors), (), self._index(*actors))


def _described(actor: Actor, length: int) -> str:
    text = f"{'an' if actor.colour[0] in 'aeiou' else 'a'} {actor.colour} {actor.name}"
    happens = [f"moves {actor.direction}"] if actor.direction else []
    happens += [f"appears at the {part_of(actor.first, length)}"] if actor.first > 0 else []
    happens += [f"disappears at the {part_of(actor.last, length)}"] if actor.last < length else []
    return f"{text} that {' and '.join(happens)}" if happens else text


def ask(
    clip: Clip, count: int, *, kinds: Sequence[str] = KINDS, seed: int = 0, attempts: int = 3
) -> tuple[Question, ...]:
    """Return up to ``count`` different questions about a clip, in turn of each kind, in a random order of kinds.

    Parameters
    ----------
    clip : Clip
        The subject; its frames are not used.
    count : int
        Maximum number of questions; fewer are returned if the clip allows no more.
    kinds : sequence of str
        Which kinds to ask.
    seed : int
        Each seed asks other questions about the same clip.
    attempts : int
        Draws per kind and turn before the kind is skipped.
    """
    asker = _Asker(clip, rng_for(clip.split, clip.seed, clip.index, _QUESTION_PURPOSE + seed))
    order = [kinds[int(i)] for i in asker.rng.permutation(len(kinds))]
    found: dict[str, Question] = {}
    turn = 0
    while len(found) < count and turn < 3 * max(count, len(kinds)):
        kind = order[turn % len(order)]
        turn += 1
        for _ in range(attempts):
            question = asker.ask(kind)
            if question is not None and question.text not in found:
                found[question.text] = question
                break
    return tuple(found.values())
