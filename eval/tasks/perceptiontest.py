"""PerceptionTest, validation, multiple choice: memory, physics and meaning in staged videos. (arXiv 2305.13786)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.scoring.choice import lone_capital
from eval.tasks.base import Sample, register_task
from eval.tasks.lettered import LETTER, VideoChoice, letter_at, lettered, letters_for
from eval.tasks.reading import need, read_json
from eval.tasks.records import as_list, records
from eval.tasks.video import Clip

_OFFICIAL = "mc_question_valid.json"


@register_task
class PerceptionTest(VideoChoice):
    """Three options."""

    name = "perceptiontest"
    licence = "CC BY 4.0"
    source = "github.com/google-deepmind/perception_test"
    layout = (
        f"{_OFFICIAL} or mc_question_val/validation-*.parquet (video_name, question_id, question, options, answer_id, "
        "area); videos/*.mp4"
    )

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        found = []
        for path, number, video, row in self._rows(folder):
            options = as_list(need(row, "options", path, number), path, number)
            letters = letters_for(options, path, number)
            ident = row["question_id"] if "question_id" in row else need(row, "id", path, number)
            found.append(
                Sample(
                    id=f"{video}-{ident}",
                    question=f"{need(row, 'question', path, number)}\n{lettered(options)}\n{LETTER}",
                    video=Clip(Path(folder or ".") / "videos" / f"{video}.mp4", self.frames),
                    target=letter_at(need(row, "answer_id", path, number), letters, path, number),
                    group=video,
                    options=letters,
                    meta={"kind": need(row, "area", path, number)},
                )
            )
        return found

    def _rows(self, folder: Path | None) -> Iterator[tuple[Path, int, str, dict[str, Any]]]:
        if folder is not None and (folder / _OFFICIAL).exists():
            path = folder / _OFFICIAL
            for number, (video, each) in enumerate(read_json(path).items(), 1):
                for row in need(each, "mc_question", path, number):
                    yield path, number, video, row
            return
        path, rows = records(self, folder, "mc_question_val/validation-*.parquet", _OFFICIAL)
        for number, row in enumerate(rows, 1):
            yield path, number, need(row, "video_name", path, number), row

    def read(self, sample: Sample, prediction: str) -> str | None:
        """The first capital of an option that is a word."""
        return lone_capital(prediction, sample.options or ())
