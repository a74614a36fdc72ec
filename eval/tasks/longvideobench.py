"""LongVideoBench, validation: questions that refer to one moment of up to an hour. (arXiv 2407.15754)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.scoring.choice import first_capital
from eval.tasks.base import Sample, register_task
from eval.tasks.lettered import LETTER, VideoChoice, letter_at, lettered, letters_for
from eval.tasks.reading import find, need
from eval.tasks.records import read
from eval.tasks.video import Clip


@register_task
class LongVideoBench(VideoChoice):
    """Three to five options, frames only: subtitles, which the benchmark can put between frames, are left out."""

    name = "longvideobench"
    licence = "CC BY-NC-SA 4.0"
    source = "github.com/longvideobench/LongVideoBench"
    layout = "lvb_val.json; videos/*.mp4"
    max_new_tokens = 32

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path = find(self, folder, "lvb_val.json")
        found = []
        for number, record in enumerate(read(path), 1):
            options = need(record, "candidates", path, number)
            letters = letters_for(options, path, number)
            video = need(record, "video_path", path, number)
            found.append(
                Sample(
                    id=need(record, "id", path, number),
                    question=f"{need(record, 'question', path, number)}\n{lettered(options)}\n{LETTER}",
                    video=Clip(path.parent / "videos" / video, self.frames),
                    target=letter_at(need(record, "correct_choice", path, number), letters, path, number),
                    group=video,
                    options=letters,
                    meta={"kind": f"{need(record, 'duration_group', path, number)} s"},
                )
            )
        return found

    def read(self, sample: Sample, prediction: str) -> str | None:
        """The first capital of an option."""
        return first_capital(prediction, sample.options or ())
