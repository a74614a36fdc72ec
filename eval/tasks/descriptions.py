"""Descriptions of whole scenes and clips: long answers, which name every object."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from eval.tasks.base import Sample, register_task
from eval.tasks.generated import ClipsTask, ScenesTask

_LONGEST = 64
_NAMED = re.compile(r"(\w+ (?:sign that says \w+|\w+))")


def named(description: str) -> set[str]:
    """Return what a description names: colours with shapes, and signs with what they say."""
    parts = (part.strip().removeprefix("an ").removeprefix("a ") for part in description.rstrip(". ").split(","))
    return {found[1] for part in parts if (found := _NAMED.match(part))}


class _Described:
    """Scores the share of the things that an answer names."""

    kinds: ClassVar[tuple[str, ...] | None] = ("describe",)
    max_new_tokens = _LONGEST
    main_score = "named"

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        """Count the things of the right answer among those of the prediction."""
        things = named(sample.target)
        return {"named": len(things & named(prediction)) / len(things), "exact": float(prediction == sample.target)}


@register_task
@dataclass(frozen=True)
class SceneDescriptionsTask(_Described, ScenesTask):
    """Asks for all objects and signs of a scene, row by row.

    The reference models were trained on answers of one word and describe nothing: with them, what counts is how far the
    probabilities of a long text move (`eval.continuations`).

    Attributes
    ----------
    pictures : int
        Number of them.
    per_picture : int
        Maximum number of wordings of the question about each.
    seed : int
        Each seed draws other pictures of the held-out split.
    """

    name = "scene-descriptions"

    per_picture: int = 1


@register_task
@dataclass(frozen=True)
class ClipDescriptionsTask(_Described, ClipsTask):
    """Asks for all objects of a clip and what becomes of them.

    Attributes
    ----------
    pictures : int
        Number of clips.
    per_picture : int
        Maximum number of wordings of the question about each.
    seed : int
        Each seed draws other clips of the held-out split.
    """

    name = "clip-descriptions"

    per_picture: int = 1
