"""MME: yes or no in fourteen categories, two questions per picture. (arXiv 2306.13394)"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vtc
from eval.scoring.answers import yes_no_or_other
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.reading import find
from eval.tasks.vqa import SHORT

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_ASKED = "Please answer yes or no."
"""Ends every question of the release; what is measured with LLaVA's prompts has their own ending instead."""


@register_task
class Mme(Task):
    """A category's score is its accuracy and its accuracy+ (both questions of a picture right), in percent, added."""

    name = "mme"
    licence = "research, on application"
    source = "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
    layout = "CATEGORY/images/*.jpg and CATEGORY/questions_answers_YN/*.txt, or both kinds side by side in CATEGORY/"
    main_score = "accuracy"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        root = find(self, folder, PERCEPTION[0]).parent
        found = []
        for category in (*PERCEPTION, *COGNITION):
            texts = root / category / "questions_answers_YN"
            texts = texts if texts.is_dir() else root / category
            pictures = root / category / "images"
            pictures = pictures if pictures.is_dir() else root / category
            for path in sorted(texts.glob("*.txt")):
                image = next((f for f in sorted(pictures.glob(f"{path.stem}.*")) if f.suffix != ".txt"), None)
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    question, tab, answer = line.rpartition("\t")
                    if not tab or answer.strip() not in ("Yes", "No"):
                        raise vtc.InputError(f"{path}, line {number}: expected QUESTION, tab, Yes or No; got {line!r}")
                    found.append(
                        Sample(
                            id=f"{category}-{path.stem}-{number}",
                            question=question.replace(_ASKED, "").strip() + SHORT,
                            images=(image if image is not None else pictures / f"{path.stem}.jpg",),
                            target=answer.strip().lower(),
                            group=f"{category}-{path.stem}",
                            meta={"kind": category},
                        )
                    )
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(yes_no_or_other(prediction) == sample.target)}

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        pictures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            pictures[record["kind"]][record["group"]].append(record["scores"]["accuracy"])
        points, plus_of = {}, {}
        for category, by_picture in pictures.items():
            accuracy = np.mean([hit for hits in by_picture.values() for hit in hits])
            plus = np.mean([all(hits) for hits in by_picture.values()])
            points[category] = float(100 * (accuracy + plus))
            plus_of[f"{category}.accuracy_plus"] = float(plus)
        totals = {
            "perception": sum(points.get(name, 0.0) for name in PERCEPTION),
            "cognition": sum(points.get(name, 0.0) for name in COGNITION),
        }
        return points | totals | plus_of
