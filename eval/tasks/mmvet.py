"""MM-Vet's questions, without the judge that its score takes. (arXiv 2308.02490)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.scoring.answers import all_of_some
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.reading import find, need, read_json


@register_task
class MmVetContained(Task):
    """How much of the wanted answer the given one contains, word for word: **no official score**.

    MM-Vet has a language model grade the answers. What is measured here says how two settings of one model compare; it
    is much lower than a grade, and explanations in words of one's own count nothing.
    """

    name = "mmvet-contained"
    licence = "Apache-2.0; pictures under their own terms"
    source = "github.com/yuweihao/MM-Vet"
    layout = "mm-vet.json; images/*"
    max_new_tokens = 128
    main_score = "contained"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path = find(self, folder, "mm-vet.json")
        return [
            Sample(
                id=str(ident),
                question=need(record, "question", path, number),
                images=(path.parent / "images" / need(record, "imagename", path, number),),
                target=need(record, "answer", path, number),
                group=record["imagename"],
                meta={"kind": "+".join(need(record, "capability", path, number))},
            )
            for number, (ident, record) in enumerate(read_json(path).items(), 1)
        ]

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        share = all_of_some(prediction, sample.target)
        return {"contained": share, "whole": float(share == 1.0)}
