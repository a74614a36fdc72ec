"""MMBench, in English and Chinese: options in every rotation, right only if all are. (arXiv 2307.06281)"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vtc
from eval.scoring.answers import option_letter
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.reading import encoded, find, read_tsv

_ROTATION = 1_000_000
"""Rotated copies of a question have its index plus multiples of this, and may leave the picture to the first."""


class _MmBench(Task):
    licence = "Apache-2.0"
    source = "github.com/open-compass/MMBench"
    main_score = "accuracy"
    files: tuple[str, ...]
    suffix: str

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path = find(self, folder, *self.files)
        rows = read_tsv(path, ("index", "question", "A", "B", "answer", "image"))
        pictures = {row["index"]: row["image"] for row in rows}
        found = []
        for row in rows:
            picture = row["image"]
            if picture is not None and picture.isdigit():  # the index of the row that holds it
                picture = pictures.get(picture)
            if picture is None:
                picture = pictures.get(str(int(row["index"]) % _ROTATION))
            if picture is None:
                raise vtc.InputError(f"{path}: row {row['index']} has no picture, and no row lends it one")
            letters = tuple(letter for letter in "ABCD" if row.get(letter) is not None)
            hint = [row["hint"]] if row.get("hint") else []
            options = [f"{letter}. {row[letter]}" for letter in letters]
            found.append(
                Sample(
                    id=row["index"],
                    question="\n".join([*hint, row["question"], *options, self.suffix]),
                    images=(encoded(picture),),
                    target=row["answer"],
                    group=str(int(row["index"]) % _ROTATION),
                    options=letters,
                    meta={"kind": row["category"]} if row.get("category") else {},
                )
            )
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(option_letter(prediction, sample.options or ()) == sample.target)}

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        rotations = defaultdict(list)
        for record in records:
            rotations[record["group"]].append(record["scores"]["accuracy"])
        return {
            "accuracy": float(np.mean([record["scores"]["accuracy"] for record in records])),
            "circular": float(np.mean([all(hits) for hits in rotations.values()])),
        }


@register_task
class MmBench(_MmBench):
    """MMBench, dev, English."""

    name = "mmbench"
    layout = "MMBench_DEV_EN.tsv or mmbench_dev_20230712.tsv (index, question, hint, A to D, answer, category, image)"
    files = ("MMBench_DEV_EN.tsv", "mmbench_dev_20230712.tsv")
    suffix = "Answer with the option's letter from the given choices directly."


@register_task
class MmBenchCn(_MmBench):
    """MMBench, dev, Chinese."""

    name = "mmbench-cn"
    layout = "MMBench_DEV_CN.tsv or mmbench_dev_cn_20231003.tsv, columns as MMBench's"
    files = ("MMBench_DEV_CN.tsv", "mmbench_dev_cn_20231003.tsv")
    suffix = "请直接回答选项字母。"
