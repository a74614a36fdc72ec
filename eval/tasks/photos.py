"""A few questions about photographs that scikit-image and scikit-learn carry, for trying things out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import vtc
from eval.scoring.answers import exact
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.vqa import SHORT

_FOLDERS: Final = {"skimage": "data", "sklearn": "datasets/images"}

QUESTIONS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "skimage/astronaut.png": (
        ("What color is the space suit?", "orange"),
        ("Is the person wearing a helmet?", "no"),
        ("What does the model in the background show?", "space shuttle|shuttle|rocket"),
    ),
    "skimage/chelsea.png": (
        ("What animal is this?", "cat"),
        ("Are the eyes of the animal open?", "yes"),
    ),
    "skimage/coffee.png": (
        ("What color is the saucer?", "red"),
        ("What is in the cup?", "coffee|espresso"),
        ("Is there a spoon on the saucer?", "yes"),
    ),
    "skimage/rocket.jpg": (
        ("What stands in the middle of the picture?", "rocket"),
        ("Is the sky cloudy?", "no"),
    ),
    "skimage/camera.png": (
        ("What does the camera stand on?", "tripod"),
        ("Is the photograph in color or in black and white?", "black and white"),
    ),
    "skimage/motorcycle_left.png": (
        ("What color is the motorcycle?", "red"),
        ("How many motorcycles are there?", "1|one"),
        ("Is somebody sitting on the motorcycle?", "no"),
    ),
    "skimage/coins.png": (
        ("What objects are shown?", "coins"),
        ("How many rows of objects are there?", "4|four"),
    ),
    "skimage/horse.png": (
        ("What animal is shown?", "horse"),
        ("Which way does the animal look, left or right?", "right"),
    ),
    "skimage/page.png": (
        ("What is the first word of the heading?", "region-based"),
        ("What is the last word of the heading?", "segmentation"),
    ),
    "sklearn/china.jpg": (
        ("Is there water in the background?", "yes"),
        ("Does the building have more than one storey?", "yes"),
    ),
    "sklearn/flower.jpg": (
        ("What is in the middle of the picture?", "flower|dahlia"),
        ("What color is the large flower?", "orange|peach"),
    ),
}
"""By picture: questions and their answers, others that count as well behind bars."""


@register_task
class Photos(Task):
    """Written for this project: too few to compare methods by, enough to see that a model looks at pictures."""

    name = "photos"
    licence = "Apache-2.0; photographs as in scikit-image and scikit-learn, mostly public domain"
    source = "the packages scikit-image and scikit-learn: pip install scikit-image scikit-learn"
    layout = "no files; the packages carry them"
    main_score = "exact"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        found = []
        for name, asked in QUESTIONS.items():
            package, file = name.split("/")
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise vtc.InputError(f"{self.name} needs packages: pip install scikit-image scikit-learn")
            path = Path(spec.origin).parent / _FOLDERS[package] / file
            for number, (question, answers) in enumerate(asked):
                kind = "yes or no" if answers in ("yes", "no") else "word"
                found.append(
                    Sample(
                        id=f"{path.stem}-{number}",
                        question=question + SHORT,
                        images=(path,),
                        target=answers.split("|"),
                        group=path.stem,
                        meta={"kind": kind},
                    )
                )
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"exact": exact(prediction, sample.target)}
