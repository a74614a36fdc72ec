"""The user's own questions in a folder: a table with one line per question, images or videos beside it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vtc
from eval.scoring.answers import exact
from eval.tasks.base import Picture, Sample, Task, register_task
from eval.tasks.records import Record, StoredPicture, find, open_base64, read
from eval.tasks.video import VideoSource

_STEMS = ("questions", "test", "val", "data")
_ENDINGS = ("jsonl", "json", "tsv", "csv", "parquet")
_MAX_PATH = 1024
"""Longer strings are base64 pictures, shorter ones paths; so the error about a missing file can name it."""


@register_task
@dataclass(frozen=True)
class FilesTask(Task):
    """Scores 1 for an answer that equals one of the given ones; case and a final full stop are ignored.

    Attributes
    ----------
    frames : int
        Number of frames to show of each video.
    """

    name = "files"
    modality = "image, video"
    licence = "yours"
    source = "you, or python -m eval.tasks.scenes --out FOLDER, or python -m eval.tasks.clips FOLDER"
    layout = (
        "questions.jsonl (or .json, .tsv, .csv, .parquet, or an arrow folder) with question, answer or answers, and "
        "image (a path in the folder, a list of paths, base64, or a picture in the table) or video (a path); "
        "question_id, kind and options as you like"
    )
    max_new_tokens = 32
    main_score = "exact"

    frames: int = 16

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        tables = find(self, folder, *(f"{stem}.{ending}" for stem in _STEMS for ending in _ENDINGS), ".")
        found = [self._sample(record, folder) for path in tables for record in read(path)]
        twice = len(found) - len({sample.id for sample in found})
        if twice:
            raise vtc.InputError(f"{tables[0]}: {twice} question_id(s) occur more than once")
        return found

    def _sample(self, record: Record, folder: Path) -> Sample:
        images, video = _pictures(record, folder), record.get("video")
        if not images and not video:
            raise record.error("neither an image nor a video")
        answers = record.as_list("answers") if record.get("answers") is not None else [record["answer"]]
        media = video or record.get("image")
        return Sample(
            id=str(record.get("question_id", record.number)),
            question=str(record["question"]),
            images=images,
            video=VideoSource(folder / video, self.frames) if video else None,
            target=[str(answer) for answer in answers],
            group=media if isinstance(media, str) and len(media) < _MAX_PATH else None,
            options=tuple(map(str, record.as_list("options"))) if record.get("options") else None,
            meta={"kind": record["kind"]} if record.get("kind") else {},
        )

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"exact": exact(prediction, sample.target)}


def _pictures(record: Record, folder: Path) -> tuple[Picture, ...]:
    values: Any = record.get("image") if record.get("image") is not None else record.get("images")
    found: list[Picture] = []
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, StoredPicture):
            found.append(value)
        elif isinstance(value, str) and value:
            found.append(folder / value if len(value) < _MAX_PATH else functools.partial(open_base64, value))
        elif value is not None:
            raise record.error(f"a picture cannot be {type(value).__name__}")
    return tuple(found)
