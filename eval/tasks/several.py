"""Two pictures in one prompt: the question is about something that only one of them shows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eval.tasks.base import Sample, register_task
from eval.tasks.generated import Generated, drawn, scene_at

if TYPE_CHECKING:
    from eval.tasks.scenes.questions import Question


@register_task
@dataclass(frozen=True)
class PicturePairsTask(Generated):
    """Shows two drawn scenes and asks for shape, colour or digit of an object unlike any in the other picture.

    The kind of a question says which picture shows it: ``first picture`` or ``second picture``.

    Attributes
    ----------
    pictures : int
        Number of pairs.
    per_picture : int
        Maximum number of questions about each pair.
    seed : int
        Each seed draws other pictures of the held-out split.
    """

    name = "picture-pairs"
    source = "drawn by eval/tasks/scenes"
    knows_truth = False  # cells are those of one picture

    pictures: int = 100
    per_picture: int = 5
    seed: int = 0

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        from eval.tasks.scenes.questions import ask

        found = []
        for index in range(self.pictures):
            scenes = [scene_at(self.seed, 2 * index + number) for number in range(2)]
            images = tuple(functools.partial(drawn, self.seed, 2 * index + number) for number in range(2))
            asked: list[list[tuple[str, Question]]] = []
            for scene, other, kind in zip(scenes, scenes[::-1], ("first picture", "second picture"), strict=True):
                colours, names = {each.colour for each in other.objects}, {each.name for each in other.objects}
                own: dict[tuple[str, int], tuple[str, Question]] = {}
                for question in ask(scene, 3 * self.per_picture, kinds=("shape", "colour", "digit")):
                    target = scene.things[question.targets[0]]
                    if target.colour not in colours and target.name not in names:
                        own.setdefault((question.kind, question.targets[0]), (kind, question))
                asked.append(list(own.values()))
            # The two pictures take turns, so that a small number of questions is about both.
            in_turn = [pair for turn in itertools.zip_longest(*asked) for pair in turn if pair is not None]
            for number, (kind, question) in enumerate(in_turn[: self.per_picture]):
                found.append(
                    Sample(
                        id=f"pair-{index}-{number}",
                        question=question.text,
                        images=images,
                        target=question.answer,
                        group=f"pair-{index}",
                        options=question.options,
                        meta={"kind": kind, "index": index},
                    )
                )
        return found
