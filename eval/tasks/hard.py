"""Questions that few tokens answer badly: crowded pictures, small writing, absent objects, second turns."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.tasks.base import Picture, Sample, Truth, register_task
from eval.tasks.generated import Generated, drawn, scene_at

if TYPE_CHECKING:
    from eval.tasks.scenes.questions import Question
    from eval.tasks.scenes.scene import Scene

SHRUNK = 154
"""Side in pixels of a scene whose writing is to be small."""

_BACKGROUND_PURPOSE = 20_000
_STRIDE = 100_000  # between the numbers of scenes that are tried for one crowded picture


@register_task
@dataclass(frozen=True)
class HardScenesTask(Generated):
    """Asks about drawn scenes what is hard to see; the kind of a question names the difficulty.

    Pictures take turns:

    - ``crowded``: at least five objects and nine things in all; any question.
    - ``small writing``: the scene at 154 instead of 224 pixels on a larger photograph; digits and signs.
    - ``absent`` and ``present``: is there an object? ``false_yes`` is the share of absent ones answered by yes.
    - ``second turn``: a question and its right answer about something else come first, in one prompt with the second.

    Attributes
    ----------
    pictures : int
        Number of them.
    per_picture : int
        Maximum number of questions about each.
    seed : int
        Each seed draws other pictures of the held-out split.
    """

    name = "hard-scenes"
    source = "drawn by eval/tasks/scenes"

    pictures: int = 100
    per_picture: int = 10
    seed: int = 0

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        ways = (self._crowded, self._small, self._absent, self._second)
        return [sample for index in range(self.pictures) for sample in ways[index % len(ways)](index)]

    def summarise(self, records: Sequence[Any]) -> dict[str, float]:
        """Add the share of absent objects that the model says are there."""
        absent = [1.0 - record["scores"]["exact"] for record in records if record.get("kind") == "absent"]
        return {**super().summarise(records), **({"false_yes": float(np.mean(absent))} if absent else {})}

    def truth(self, sample: Sample) -> Truth:
        """List the patches of each object, the one that it fills most first."""
        from eval.tasks.scenes.vocabulary import GRID

        scene = scene_at(self.seed, int(sample.meta["index"]))
        things = (thing for thing in scene.things if thing.role != "distractor")
        small = _corner(scene) if sample.meta["kind"] == "small writing" else None
        patches = tuple(thing.patches if small is None else _patches(thing.box, small) for thing in things)
        return Truth(patches, (1, GRID, GRID), (self.seed, int(sample.meta["index"])))

    def _crowded(self, index: int) -> Iterator[Sample]:
        from eval.tasks.scenes.questions import ask

        attempt = index
        while len((scene := scene_at(self.seed, attempt)).objects) < 5 or len(scene.things) < 9:
            attempt += _STRIDE
        for number, question in enumerate(ask(scene, self.per_picture)):
            yield self._sample(attempt, number, question, "crowded")

    def _small(self, index: int) -> Iterator[Sample]:
        from eval.tasks.scenes.questions import ask

        scene = scene_at(self.seed, index)
        for number, question in enumerate(ask(scene, self.per_picture, kinds=("digit", "reading"))):
            yield self._sample(index, number, question, "small writing", functools.partial(_shrunk, self.seed, index))

    def _absent(self, index: int) -> Iterator[Sample]:
        from eval.tasks.scenes.questions import ask

        for number, question in enumerate(ask(scene_at(self.seed, index), self.per_picture, kinds=("exist",))):
            yield self._sample(index, number, question, "present" if question.answer == "yes" else "absent")

    def _second(self, index: int) -> Iterator[Sample]:
        from eval.tasks.scenes.questions import ask

        asked = ask(scene_at(self.seed, index), 2 * self.per_picture)
        for number, (first, second) in enumerate(zip(asked[::2], asked[1::2], strict=False)):
            yield self._sample(index, number, second, "second turn", earlier=((first.text, first.answer),))

    def _sample(
        self,
        index: int,
        number: int,
        question: Question,
        kind: str,
        picture: Picture | None = None,
        earlier: tuple[tuple[str, str], ...] = (),
    ) -> Sample:
        return Sample(
            id=f"hard-{index}-{number}",
            question=question.text,
            images=(picture or functools.partial(drawn, self.seed, index),),
            target=question.answer,
            group=f"hard-{index}",
            options=question.options,
            meta={"kind": kind, "index": index},
            earlier=earlier,
        )


def _shrunk(seed: int, index: int) -> Any:
    """Draw the scene smaller somewhere on another photograph of the split."""
    from PIL import Image

    from eval.tasks.scenes import sources
    from eval.tasks.scenes.scene import rng_for
    from eval.tasks.scenes.vocabulary import CANVAS

    scene = scene_at(seed, index)
    rng = rng_for(scene.split, seed, index, _BACKGROUND_PURPOSE)
    around = np.clip(sources.background(scene.split, CANVAS, rng), 0, 255).astype(np.uint8)
    left, top = _corner(scene)
    small = Image.fromarray(scene.image).resize((SHRUNK, SHRUNK), Image.Resampling.BICUBIC)
    around[top : top + SHRUNK, left : left + SHRUNK] = np.asarray(small)
    return around


def _corner(scene: Scene) -> tuple[int, int]:
    """Return (left, top) of the smaller scene in its picture."""
    from eval.tasks.scenes.scene import rng_for
    from eval.tasks.scenes.vocabulary import CANVAS

    rng = rng_for(scene.split, scene.seed, scene.index, _BACKGROUND_PURPOSE + 1)
    left, top = rng.integers(0, CANVAS - SHRUNK + 1, 2)
    return int(left), int(top)


def _patches(box: tuple[int, int, int, int], corner: tuple[int, int]) -> tuple[int, ...]:
    """Return the patches that a box of the scene covers in the picture with the smaller scene, the fullest first."""
    from eval.tasks.scenes.scene import covered_patches
    from eval.tasks.scenes.vocabulary import CANVAS

    left, top, width, height = (round(side * SHRUNK / CANVAS) for side in box)
    return covered_patches(np.ones((max(1, height), max(1, width)), np.float32), left + corner[0], top + corner[1])
