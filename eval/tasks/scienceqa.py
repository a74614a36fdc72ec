"""ScienceQA, the questions with a picture. (arXiv 2209.09513)"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from eval.scoring.choice import option_letter
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.reading import find, need, read_json


@register_task
class ScienceQaImage(Task):
    """Choose an option; an answer that names none is wrong."""

    name = "scienceqa-img"
    licence = "CC BY-NC-SA 4.0"
    source = "github.com/lupantech/ScienceQA; questions as LLaVA's evaluation bundle words them"
    layout = "llava_test_CQM-A.json; images/test/ID/image.png"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path = find(self, folder, "llava_test_CQM-A.json")
        found = []
        for number, record in enumerate(read_json(path), 1):
            if "image" not in record:
                continue
            asked, answered = (turn["value"] for turn in need(record, "conversations", path, number))
            text = asked.replace("<image>", "").strip()
            letters = tuple(re.findall(r"^([A-Z])\. ", text, re.MULTILINE))
            found.append(
                Sample(
                    id=str(need(record, "id", path, number)),
                    question=f"{text}\nAnswer with the option's letter from the given choices directly.",
                    images=(path.parent / "images" / "test" / record["image"],),
                    target=answered,
                    options=letters,
                )
            )
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"score": float(option_letter(prediction, sample.options or ()) == sample.target)}
