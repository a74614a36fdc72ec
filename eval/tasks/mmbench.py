"""MMBench, in English and Chinese: once as it stands, or in every rotation and right only if all are. (2307.06281)"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import vtc
from eval.scoring.choice import letter_or_text
from eval.tasks.base import Picture, Sample, register_task
from eval.tasks.lettered import Lettered, lettered
from eval.tasks.reading import need
from eval.tasks.records import picture, records

_ROTATION = 1_000_000
"""Rotated copies of a question have its index plus multiples of this, and may leave the picture to the first."""


class _MmBench(Lettered):
    licence = "Apache-2.0"
    source = "github.com/open-compass/MMBench"
    files: ClassVar[tuple[str, ...]]
    suffix: ClassVar[str] = "Answer with the option's letter from the given choices directly."

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path, rows = records(self, folder, *self.files)
        pictures = {str(need(row, "index", path, number)): row.get("image") for number, row in enumerate(rows, 1)}
        found = []
        for number, row in enumerate(rows, 1):
            index = int(row["index"])
            if index < _ROTATION:
                found.append(self._sample(row, path, number, _shown(row, pictures, path, number)))
        return found

    def _sample(self, row: Mapping[str, Any], path: Path, number: int, shown: Picture) -> Sample:
        letters = _letters(row)
        hint = [row["hint"]] if row.get("hint") not in _NOTHING else []
        texts = [str(row[letter]) for letter in letters]
        if not texts:
            raise vtc.InputError(f"{path}: no column A, so row {row['index']} has no options")
        return Sample(
            id=str(row["index"]),
            question="\n".join([*hint, need(row, "question", path, number), lettered(texts), self.suffix]),
            images=(shown,),
            target=need(row, "answer", path, number),
            group=str(int(row["index"]) % _ROTATION),
            options=letters,
            meta={"texts": texts, **({"kind": row["category"]} if row.get("category") else {})},
        )

    def read(self, sample: Sample, prediction: str) -> str | None:
        """The letter, or else the text of an option."""
        return letter_or_text(prediction, dict(zip(sample.options or (), sample.meta["texts"], strict=True)))


class _Circular(_MmBench):
    """As many questions as options, each in a rotation of its own; those that a release brings along are taken."""

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path, rows = records(self, folder, *self.files)
        pictures = {str(need(row, "index", path, number)): row.get("image") for number, row in enumerate(rows, 1)}
        rotated = any(int(row["index"]) >= _ROTATION for row in rows)
        found = []
        for number, row in enumerate(rows, 1):
            shown = _shown(row, pictures, path, number)
            for turned in [row] if rotated else _rotations(row, path, number):
                found.append(self._sample(turned, path, number, shown))
        # Rotations of one question side by side, so that a limit does not cut them all off.
        return sorted(found, key=lambda sample: (int(sample.group or 0), int(sample.id)))

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """``circular`` counts questions, ``accuracy`` every rotation for itself, ``vanilla`` the first of each only."""
        rotations = defaultdict(list)
        for record in records:
            rotations[record["group"]].append(record)
        every = [record["scores"]["accuracy"] for record in records]
        first = [r["scores"]["accuracy"] for r in records if r["sample"] == r["group"]]
        right = [all(r["scores"]["accuracy"] for r in group) for group in rotations.values()]
        return {
            "circular": float(np.mean(right)),
            "accuracy": float(np.mean(every)),
            **({"vanilla": float(np.mean(first))} if first else {}),
        }


_NOTHING = (None, "", "nan")
"""How tables write that there is nothing."""


def _letters(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(letter for letter in "ABCD" if row.get(letter) not in _NOTHING)


def _rotations(row: Mapping[str, Any], path: Path, number: int) -> list[dict[str, Any]]:
    """The options moved on by one, two, ... places."""
    letters = _letters(row)
    answer = letters.index(need(row, "answer", path, number))
    found = []
    for turn in range(len(letters)):
        moved = {letters[(place + turn) % len(letters)]: row[letter] for place, letter in enumerate(letters)}
        right = letters[(answer + turn) % len(letters)]
        found.append({**row, **moved, "answer": right, "index": int(row["index"]) + turn * _ROTATION})
    return found


def _shown(row: Mapping[str, Any], pictures: Mapping[Any, Any], path: Path, number: int) -> Picture:
    """A row's own picture, or the one it borrows by a row's index or as a rotation."""
    image = need(row, "image", path, number)
    if isinstance(image, str) and image.isdigit():
        image = pictures.get(image)
    if image is None:
        image = pictures.get(str(int(row["index"]) % _ROTATION))
    if image is None:
        raise vtc.InputError(f"{path}: row {row['index']} has no picture, and no row lends it one")
    return picture({"image": image}, path, number)


_LAYOUT = " (index, question, hint, A to D, answer, category, image)"
_EN = ("MMBench_DEV_EN.tsv", "mmbench_dev_20230712.tsv", "en/dev-*.parquet")
_CN = ("MMBench_DEV_CN.tsv", "mmbench_dev_cn_20231003.tsv", "cn/dev-*.parquet")


@register_task
class MmBench(_MmBench):
    """MMBench, dev, English, each question once."""

    name = "mmbench"
    layout = " or ".join(_EN) + _LAYOUT
    files = _EN


@register_task
class MmBenchCircular(_Circular):
    """MMBench, dev, English, CircularEval."""

    name = "mmbench-circular"
    layout = " or ".join(_EN) + _LAYOUT
    files = _EN


@register_task
class MmBenchCn(_MmBench):
    """MMBench, dev, Chinese, each question once."""

    name = "mmbench-cn"
    layout = " or ".join(_CN) + _LAYOUT
    files = _CN
    suffix = "请直接回答选项字母。"


@register_task
class MmBenchCnCircular(_Circular):
    """MMBench, dev, Chinese, CircularEval."""

    name = "mmbench-cn-circular"
    layout = " or ".join(_CN) + _LAYOUT
    files = _CN
    suffix = "请直接回答选项字母。"
