"""POPE: is there such an object in the picture? (arXiv 2305.10355)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.scoring.answers import binary, yes_no
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.reading import find, need, read_lines
from eval.tasks.vqa import SHORT

SPLITS = ("random", "popular", "adversarial")


@register_task
class Pope(Task):
    """Yes or no, in three splits; the figure that papers print is the mean F1."""

    name = "pope"
    licence = "MIT; images: COCO terms"
    source = "github.com/AoiDragon/POPE (output/coco) and COCO val2014"
    layout = "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json; val2014/COCO_val2014_*.jpg"
    main_score = "accuracy"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        found = []
        for split in SPLITS:
            path = find(self, folder, f"coco_pope_{split}.json")
            for number, record in enumerate(read_lines(path), 1):
                image = need(record, "image", path, number)
                found.append(
                    Sample(
                        id=f"{split}-{need(record, 'question_id', path, number)}",
                        question=need(record, "text", path, number) + SHORT,
                        images=(path.parent / "val2014" / image,),
                        target=need(record, "label", path, number),
                        group=image,
                        options=("yes", "no"),
                        meta={"kind": split},
                    )
                )
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        said, wanted = yes_no(prediction), sample.target
        return {"accuracy": float(said == wanted), "said_yes": float(said == "yes"), "is_yes": float(wanted == "yes")}

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        found, f1 = {}, []
        for split in SPLITS:
            mine = [record["scores"] for record in records if record["kind"] == split]
            if mine:
                sides = (["yes" if scores[key] else "no" for scores in mine] for key in ("said_yes", "is_yes"))
                figures = binary(*sides)
                f1.append(figures["f1"])
                found |= {f"{split}.{name}": value for name, value in figures.items()}
        return found | {"mean_f1": float(np.mean(f1))}
