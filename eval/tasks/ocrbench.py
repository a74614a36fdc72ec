"""OCRBench: text in pictures of all sorts, read, asked about, or extracted. (arXiv 2305.07895)"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.scoring.answers import contained
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.reading import need, read_json
from eval.tasks.records import as_list, picture, records

_FORMULAS = "Handwritten Mathematical Expression Recognition"
_OFFICIAL = ("OCRBench.json", "OCRBench/OCRBench.json")


@register_task
class OcrBench(Task):
    """An answer is right if it contains the text; the sum over 1,000 questions is the figure that papers print."""

    name = "ocrbench"
    licence = "research; images of 29 data sets under their own terms"
    source = "github.com/Yuliang-Liu/MultimodalOCR"
    layout = (
        "OCRBench.json or OCRBench/OCRBench.json, pictures in OCRBench_Images/; or data/test-*.parquet or an arrow "
        "folder (question, answer, question_type, image); or OCRBench.tsv (index, question, answer, category, image)"
    )
    max_new_tokens = 128

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        official = next((folder / name for name in _OFFICIAL if folder and (folder / name).exists()), None)
        if official is not None:
            path, rows = official, read_json(official)
        else:
            path, rows = records(self, folder, "data/test-*.parquet", "test-*.parquet", "test", ".", "OCRBench.tsv")
        found = []
        for number, row in enumerate(rows, 1):
            kind = next((row[name] for name in ("type", "question_type", "category") if row.get(name)), None)
            answers = row["answers"] if "answers" in row else need(row, "answer", path, number)
            if isinstance(answers, str):
                answers = as_list(answers, path, number) if answers.startswith("[") else [answers]
            image = path.parent / "OCRBench_Images" / row["image_path"] if "image_path" in row else None
            found.append(
                Sample(
                    id=str(row.get("index", number)),
                    question=need(row, "question", path, number).strip(),
                    images=(image if image is not None else picture(row, path, number),),
                    target=[str(answer) for answer in answers],
                    meta={"kind": kind if kind is not None else need(row, "question_type", path, number)},
                )
            )
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"score": contained(prediction, sample.target, formula=sample.meta["kind"] == _FORMULAS)}

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        points: dict[str, float] = defaultdict(float)
        for record in records:
            kind = record["kind"]
            group = "Text Recognition" if kind.endswith("Recognition") and kind != _FORMULAS else kind
            points[group] += record["scores"]["score"]
        total = sum(points.values())
        return {"score": total / len(records), "points": total, **points}
