"""easy-VQA, out of its own package: one coloured shape a picture, for trying things out."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import vtc
from eval.scoring.answers import exact
from eval.tasks.base import Sample, Task, register_task


@register_task
class EasyVqa(Task):
    """Nearly every subset of the tokens answers these, so they tell a broken set-up from a working one, not methods."""

    name = "easy-vqa"
    licence = "MIT"
    source = "the package easy-vqa: pip install easy-vqa"
    layout = "no files; the package carries them"
    max_new_tokens = 8
    main_score = "exact"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        try:
            package = importlib.import_module("easy_vqa")
        except ModuleNotFoundError as error:
            raise vtc.InputError(f"{self.name} needs a package that is not installed: pip install easy-vqa") from error
        files = package.get_test_image_paths()
        return [
            Sample(
                id=f"{number:05d}",
                question=text[:1].upper() + text[1:],
                images=(Path(files[image]),),
                target=answer,
                group=str(image),
                meta={"kind": "yes or no" if answer in ("yes", "no") else "word"},
            )
            for number, (text, answer, image) in enumerate(zip(*package.get_test_questions(), strict=True))
        ]

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"exact": exact(prediction, [sample.target])}
