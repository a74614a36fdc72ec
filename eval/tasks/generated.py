"""The offline task: held-out scenes of the reference models' world, drawn as they are needed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import vtc
from eval.tasks.base import Sample, Task, register_task


@register_task
@dataclass(frozen=True)
class ScenesTask(Task):
    """Objects, digits and signs on photographs; the answer must be right word for word.

    Attributes
    ----------
    scenes : int
        How many pictures.
    per_scene : int
        Questions about each, at most.
    seed : int
        Another seed draws other pictures of the held-out split.
    """

    name: ClassVar[str] = "scenes"
    licence: ClassVar[str] = "Apache-2.0; photographs and digits see eval/reference/README.md"
    source: ClassVar[str] = "drawn by eval/tasks/scenes"
    layout: ClassVar[str] = "no files"
    max_new_tokens: ClassVar[int] = 6
    main_score: ClassVar[str] = "exact"
    knows_truth: ClassVar[bool] = True

    scenes: int = 100
    per_scene: int = 10
    seed: int = 0

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        from eval.tasks.scenes.questions import ask

        found = []
        for index in range(self.scenes):
            scene = _scene(self.seed, index)
            picture = functools.partial(_picture, self.seed, index)
            for number, question in enumerate(ask(scene, self.per_scene)):
                found.append(
                    Sample(
                        id=f"scene-{index}-{number}",
                        question=question.text,
                        images=(picture,),
                        target=question.answer,
                        group=f"scene-{index}",
                        options=question.options,
                        meta={"kind": question.kind, "scene": index},
                    )
                )
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"exact": float(prediction.strip() == sample.target)}

    def bound(self, which: str, sample: Sample, keep_ratio: float | None, keep_tokens: int | None) -> Sequence[int]:
        """Object tokens in turns, then others ("oracle"), or others first; one token per patch is taken for granted."""
        from eval.tasks.scenes import oracle
        from eval.tasks.scenes.vocabulary import GRID

        choose = {"oracle": oracle.round_robin, "anti-oracle": oracle.anti_oracle}[which]
        total = GRID * GRID
        budget = keep_tokens if keep_ratio is None else max(1, round(keep_ratio * total))
        if budget is None or not 1 <= budget <= total:
            raise vtc.ConfigError(f"{which} keeps between 1 and {total} tokens, got {budget}")
        index = int(sample.meta["scene"])
        kept = choose(_scene(self.seed, index).things, budget, np.random.default_rng([self.seed, index]))
        return [int(i) for i in kept]


@functools.lru_cache(maxsize=64)
def _scene(seed: int, index: int) -> Any:
    from eval.tasks.scenes.scene import make_scene

    return make_scene("test", seed, index)


def _picture(seed: int, index: int) -> Any:
    return _scene(seed, index).image
