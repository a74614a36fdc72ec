"""Questions of one's own in a folder: a table with a line per question, pictures or videos beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import vtc
from eval.scoring.answers import exact
from eval.tasks.base import Picture, Sample, Task, register_task
from eval.tasks.reading import encoded, need
from eval.tasks.records import PictureCell, Record, as_list, records
from eval.tasks.video import Clip

_STEMS = ("questions", "test", "val", "data")
_ENDINGS = ("jsonl", "json", "tsv", "csv", "parquet")


@register_task
@dataclass(frozen=True)
class FilesTask(Task):
    """An answer is right if it is one of the wanted ones, case and a full stop at the end apart.

    Attributes
    ----------
    frames : int
        How many of a video are shown.
    """

    name: ClassVar[str] = "files"
    modality: ClassVar[str] = "image, video"
    licence: ClassVar[str] = "yours"
    source: ClassVar[str] = "you, or python -m eval.tasks.scenes FOLDER, or python -m eval.tasks.clips FOLDER"
    layout: ClassVar[str] = (
        "questions.jsonl (or .json, .tsv, .csv, .parquet, or an arrow folder) with question, answer or answers, and "
        "image (a path in the folder, a list of paths, base64, or a picture in the table) or video (a path); "
        "question_id, kind and options as you like"
    )
    max_new_tokens: ClassVar[int] = 32
    main_score: ClassVar[str] = "exact"

    frames: int = 16

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        tables = [f"{stem}.{ending}" for stem in _STEMS for ending in _ENDINGS]
        path, rows = records(self, folder, *tables, ".")
        root = path if path.is_dir() else path.parent
        found = [self._sample(row, root, path, number) for number, row in enumerate(rows, 1)]
        twice = len(found) - len({sample.id for sample in found})
        if twice:
            raise vtc.InputError(f"{path}: {twice} question_id(s) occur more than once")
        return found

    def _sample(self, row: Record, root: Path, path: Path, number: int) -> Sample:
        images, video = _shown(row, root, path, number), row.get("video")
        if not images and not video:
            raise vtc.InputError(f"{path}, record {number}: neither an image nor a video")
        answers = row["answers"] if row.get("answers") is not None else [need(row, "answer", path, number)]
        options = row.get("options")
        first = row.get("video") or row.get("image")
        return Sample(
            id=str(row.get("question_id", number)),
            question=str(need(row, "question", path, number)),
            images=images,
            video=Clip(root / video, self.frames) if video else None,
            target=[str(answer) for answer in as_list(answers, path, number)],
            group=first if isinstance(first, str) and len(first) < _PATH else None,
            options=tuple(map(str, as_list(options, path, number))) if options else None,
            meta={"kind": row["kind"]} if row.get("kind") else {},
        )

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"exact": exact(prediction, sample.target)}


_PATH = 1024
"""Longer text is no path but base64; short text that is no file is taken for a path, whose absence is then told."""


def _shown(row: Record, root: Path, path: Path, number: int) -> tuple[Picture, ...]:
    cells: Any = row.get("image") if row.get("image") is not None else row.get("images")
    found: list[Picture] = []
    for cell in cells if isinstance(cells, list) else [cells]:
        if isinstance(cell, PictureCell):
            found.append(cell)
        elif isinstance(cell, str) and cell:
            found.append(root / cell if len(cell) < _PATH else encoded(cell))
        elif cell is not None:
            raise vtc.InputError(f"{path}, record {number}: a picture cannot be {type(cell).__name__}")
    return tuple(found)
