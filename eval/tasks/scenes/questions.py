"""Questions about a scene, in English, each with exactly one right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.tasks.scenes.scene import Scene, Thing, rng_for
from eval.tasks.scenes.vocabulary import (
    CANVAS,
    COLOURS,
    COUNTS,
    DIGITS,
    KINDS,
    NUMBERS,
    PATCH,
    PLACES,
    SHAPES,
    SIGN_COLOURS,
    WORDS,
)

MARGIN = 12.0
"""Smallest difference in pixels for which positions are compared."""

PLACE_MARGIN = 20.0
"""Smallest distance in pixels from the centre lines for which an object's corner is asked."""

_QUESTION_PURPOSE = 1  # keeps the generator of questions apart from the generator of pixels


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes
    ----------
    kind : str
        One of :data:`~eval.tasks.scenes.vocabulary.KINDS`, or "describe" or "region", which are asked on request only.
    text, answer : str
        The question and its one right answer.
    targets : tuple of int
        Indices into ``scene.things`` of what must be seen to answer; for absent objects and totals, every object.
    options : tuple of str
        All possible answers to a question of this form.
    focus : tuple of int
        Indices into ``scene.things`` of what the answer is about; empty for absent objects.
    """

    kind: str
    text: str
    answer: str
    targets: tuple[int, ...]
    options: tuple[str, ...]
    focus: tuple[int, ...] = ()


YES_NO = ("yes", "no")
OBJECT_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
WRITINGS = WORDS + NUMBERS

_SIDES: dict[str, tuple[int, int]] = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
_EXTREMES: dict[str, tuple[int, int]] = {
    "leftmost": (0, 1),
    "rightmost": (0, -1),
    "topmost": (1, 1),
    "lowest": (1, -1),
}


class _Asker:
    """Generates questions about one scene; an ``_ask_*`` method returns None if the scene allows none of its kind."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene = scene
        self.rng = rng
        self.everything = tuple(scene.things.index(thing) for thing in scene.objects)

    def ask(self, kind: str) -> Question | None:
        asker: Callable[[], Question | None] = getattr(self, f"_ask_{kind}")
        return asker()

    def _pick(self, items: Sequence[str]) -> str:
        return items[int(self.rng.integers(len(items)))]

    def _one(self, things: Sequence[Thing]) -> Thing:
        return things[int(self.rng.integers(len(things)))]

    def _index(self, *things: Thing) -> tuple[int, ...]:
        return tuple(self.scene.things.index(thing) for thing in things)

    def _unique_shape(self, thing: Thing) -> bool:
        return sum(other.name == thing.name for other in self.scene.objects) == 1

    def _refer(self, thing: Thing) -> str:
        """Return a definite description that fits this object alone (colours are unique in a scene)."""
        draw = self.rng.random()
        if draw < 0.35 and self._unique_shape(thing):
            return f"the {thing.name}"
        if draw < 0.55:
            return f"the {thing.colour} {self._pick(('object', 'thing'))}"
        return f"the {thing.colour} {thing.name}"

    def _ask_exist(self) -> Question:
        objects = self.scene.objects
        present = {(thing.colour, thing.name) for thing in objects}
        yes = bool(objects) and self.rng.random() < 0.5
        if yes:
            target = self._one(objects)
            phrase, targets = f"{target.colour} {target.name}", self._index(target)
            if self.rng.random() < 0.25:
                phrase = f"{target.colour} {self._pick(('object', 'thing'))}"
        else:
            targets = self.everything
            colours = sorted({c for c, _ in present})
            absent = [c for c in COLOURS if c not in colours]
            if absent and self.rng.random() < 0.25:
                phrase = f"{self._pick(absent)} {self._pick(('object', 'thing'))}"
            else:  # half of the time with a colour of the scene on another shape, so that colour alone does not decide
                while True:
                    colour = self._pick(colours) if colours and self.rng.random() < 0.5 else self._pick(list(COLOURS))
                    shape = self._pick(SHAPES)
                    if (colour, shape) not in present:
                        break
                phrase = f"{colour} {shape}"
        article = "an" if phrase[0] in "aeiou" else "a"
        text = self._pick(
            ("Is there {0} {1}?", "Do you see {0} {1}?", "Does the picture show {0} {1}?", "Is {0} {1} in the picture?")
        ).format(article, phrase)
        return Question("exist", text, "yes" if yes else "no", targets, YES_NO, targets if yes else ())

    def _ask_colour(self) -> Question | None:
        candidates = [thing for thing in self.scene.objects if self._unique_shape(thing)]
        if not candidates:
            return None
        target = self._one(candidates)
        text = self._pick(
            (
                "What colour is the {0}?",
                "What color is the {0}?",
                "What is the colour of the {0}?",
                "Which colour has the {0}?",
            )
        ).format(target.name)
        return Question("colour", text, target.colour, self._index(target), tuple(COLOURS), self._index(target))

    def _ask_shape(self) -> Question | None:
        if not self.scene.objects:
            return None
        target = self._one(self.scene.objects)
        text = self._pick(
            ("What shape is the {0} object?", "What shape is the {0} thing?", "What is the shape of the {0} object?",
             "Which shape is {0}?")
        ).format(target.colour)  # fmt: skip
        return Question("shape", text, target.name, self._index(target), SHAPES, self._index(target))

    def _ask_place(self) -> Question | None:
        candidates = [thing for thing in self.scene.objects if _in_a_corner(thing)]
        if not candidates:
            return None
        target = self._one(candidates)
        answer = _corner_of(target)
        text = self._pick(
            (
                "Where is {0}?",
                "In which corner is {0}?",
                "In which part of the picture is {0}?",
                "Where do you see {0}?",
            )
        ).format(self._refer(target))
        return Question("place", text, answer, self._index(target), PLACES, self._index(target))

    def _ask_relation(self) -> Question | None:
        if len(self.scene.objects) < 2:
            return None
        return self._ask_beside() if self.rng.random() < 0.5 else self._ask_compare()

    def _ask_compare(self) -> Question | None:
        side = self._pick(tuple(_SIDES))
        axis, sign = _SIDES[side]
        first, second = (self.scene.objects[i] for i in self.rng.permutation(len(self.scene.objects))[:2])
        lead = sign * (second.centre[axis] - first.centre[axis])
        if abs(lead) < MARGIN:
            return None
        text = self._pick(("Is {0} {1} {2}?", "Would you say that {0} is {1} {2}?")).format(
            self._refer(first), side, self._refer(second)
        )
        answer = "yes" if lead > 0 else "no"
        farther = first if lead > 0 else second
        return Question("relation", text, answer, self._index(first, second), YES_NO, self._index(farther))

    def _ask_beside(self) -> Question | None:
        """Ask what is beside an object, if exactly one object is, by at least the margin."""
        choices = []
        for side, (axis, sign) in _SIDES.items():
            for anchor in self.scene.objects:
                leads = {
                    t: sign * (anchor.centre[axis] - t.centre[axis]) for t in self.scene.objects if t is not anchor
                }
                there = [t for t, lead in leads.items() if lead > 0]
                if len(there) == 1 and leads[there[0]] >= MARGIN and min(abs(v) for v in leads.values()) >= MARGIN:
                    choices.append((side, anchor, there[0]))
        if not choices:
            return None
        side, anchor, target = choices[int(self.rng.integers(len(choices)))]
        wording = f"to the {side}" if side in ("left of", "right of") and self.rng.random() < 0.3 else side
        text = self._pick(("What is {0} {1}?", "Which object is {0} {1}?", "What do you see {0} {1}?")).format(
            wording, self._refer(anchor)
        )
        answer = f"{target.colour} {target.name}"
        return Question("relation", text, answer, self._index(target, anchor), OBJECT_NAMES, self._index(target))

    def _ask_extreme(self) -> Question | None:
        objects = self.scene.objects
        if len(objects) < 2:
            return None
        word = self._pick(tuple(_EXTREMES))
        axis, sign = _EXTREMES[word]
        ranked = sorted(objects, key=lambda thing: sign * thing.centre[axis])
        if sign * (ranked[1].centre[axis] - ranked[0].centre[axis]) < MARGIN:
            return None
        target = ranked[0]
        if self.rng.random() < 0.6:
            text = self._pick(("What colour is the {0} object?", "What color is the {0} thing?")).format(word)
            return Question("extreme", text, target.colour, self.everything, tuple(COLOURS), self._index(target))
        text = self._pick(("What shape is the {0} object?", "What is the shape of the {0} thing?")).format(word)
        return Question("extreme", text, target.name, self.everything, SHAPES, self._index(target))

    def _ask_count(self) -> Question:
        objects = self.scene.objects
        if self.rng.random() < 0.5:
            text = self._pick(("How many coloured objects are there?", "How many colored objects do you see?",
                               "Count the coloured objects."))  # fmt: skip
            return Question("count", text, str(len(objects)), self.everything, COUNTS, self.everything)
        names = sorted({thing.name for thing in objects})
        shape = self._pick(names) if names and self.rng.random() < 0.75 else self._pick(SHAPES)
        text = self._pick(("How many {0}s are there?", "How many {0}s do you see?", "Count the {0}s.")).format(shape)
        counted = self._index(*(thing for thing in objects if thing.name == shape))
        return Question("count", text, str(len(counted)), self.everything, COUNTS, counted)

    def _ask_digit(self) -> Question | None:
        candidates = [thing for thing in self.scene.objects if thing.text]
        if not candidates:
            return None
        target = self._one(candidates)
        text = self._pick(
            (
                "What digit is on {0}?",
                "Which digit is on {0}?",
                "What digit is written on {0}?",
                "Which digit do you see on {0}?",
            )
        ).format(self._refer(target))
        return Question("digit", text, target.text, self._index(target), DIGITS, self._index(target))

    def _ask_reading(self) -> Question | None:
        if not self.scene.signs:
            return None
        target = self._one(self.scene.signs)
        alone = len(self.scene.signs) == 1 and self.rng.random() < 0.5
        sign = "the sign" if alone else f"the {target.colour} sign"
        what = "number" if target.text in NUMBERS else "word"
        text = self._pick(
            (
                "What {1} is on {0}?",
                "Which {1} is written on {0}?",
                "What does {0} say?",
                "What is written on {0}?",
                "Read {0}.",
            )
        ).format(sign, what)
        return Question("reading", text, target.text, self._index(target), WRITINGS, self._index(target))

    def _ask_describe(self) -> Question | None:
        """Ask for everything that questions may name, row by row of patches and from left to right."""
        things = sorted(self.scene.named, key=lambda thing: (int(thing.centre[1]) // PATCH, thing.centre[0]))
        if not things:
            return None
        text = self._pick(("Describe the picture.", "Describe all objects.", "What is in the picture?"))
        answer = ", ".join(_described(thing) for thing in things) + "."
        return Question("describe", text, answer, self._index(*things), (), self._index(*things))

    def _ask_region(self) -> Question | None:
        """Ask about one object or sign without saying which: its box has to be marked."""
        if not self.scene.named:
            return None
        target = self._one(self.scene.named)
        found = self._index(target)
        draw = self.rng.random()
        digit = target.role == "object"
        if target.text and (draw < 0.4 or not digit):
            text = "What digit is on the object?" if digit else "What is written on the sign?"
            return Question("region", text, target.text, found, DIGITS if digit else WRITINGS, found)
        if draw < 0.7:
            return Question("region", "What colour is the object?", target.colour, found, tuple(COLOURS), found)
        return Question("region", "What shape is the object?", target.name, found, SHAPES, found)


def _in_a_corner(thing: Thing) -> bool:
    """Return whether an object is far enough from the centre lines for its corner to be named."""
    return min(abs(place - CANVAS / 2) for place in thing.centre) >= PLACE_MARGIN


def _corner_of(thing: Thing) -> str:
    x, y = thing.centre
    return f"{'top' if y < CANVAS / 2 else 'bottom'} {'left' if x < CANVAS / 2 else 'right'}"


def _described(thing: Thing) -> str:
    text = f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.name}"
    if thing.text:
        text += f" that says {thing.text}" if thing.role == "sign" else f" with the digit {thing.text}"
    return f"{text} at the {_corner_of(thing)}" if _in_a_corner(thing) else text


def ask(
    scene: Scene, count: int, *, kinds: Sequence[str] = KINDS, seed: int = 0, attempts: int = 4
) -> tuple[Question, ...]:
    """Return up to ``count`` different questions about a scene, in turn of each kind, in a random order of kinds.

    Parameters
    ----------
    scene : Scene
        The subject.
    count : int
        Maximum number of questions; fewer are returned if the scene allows no more.
    kinds : sequence of str
        Which kinds to ask.
    seed : int
        Each seed asks other questions about the same scene.
    attempts : int
        Draws per kind and turn before the kind is skipped.
    """
    asker = _Asker(scene, rng_for(scene.split, scene.seed, scene.index, _QUESTION_PURPOSE + seed))
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


def sentences() -> tuple[str, ...]:
    """Return every word of these questions and answers in short sentences, the corpus of the tokenizer."""
    things = [*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *SIGN_COLOURS, *WORDS, *NUMBERS, *DIGITS, *COUNTS]
    return tuple(f" {thing}" for thing in things) + tuple(PLACES) + YES_NO
