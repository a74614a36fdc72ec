"""Video-MME, with and without subtitles: eleven seconds to an hour. (arXiv 2405.21075)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.scoring.choice import first_capital
from eval.tasks.base import SUBTITLES, Sample, register_task
from eval.tasks.lettered import VideoChoice
from eval.tasks.reading import need
from eval.tasks.records import as_list, records
from eval.tasks.video import Clip

_ASKED = (
    "Select the best answer to the following multiple-choice question based on the video{more}. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
_TABLES = ("videomme/test-*.parquet", "test-*.parquet", "test", ".")


@register_task
class VideoMme(VideoChoice):
    """Four options; figures for short, medium and long videos as papers print them."""

    name = "videomme"
    licence = "academic research only"
    source = "github.com/MME-Benchmarks/Video-MME"
    layout = (
        "videomme/test-*.parquet, there or in the folder itself, or an arrow folder (videoID, question_id, question, "
        "options, answer, duration); data/VIDEOID.mp4 or .mkv"
    )

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path, rows = records(self, folder, *_TABLES)
        root = Path(folder or ".")
        found = []
        for number, row in enumerate(rows, 1):
            video = need(row, "videoID", path, number)
            files = [root / "data" / f"{video}{ending}" for ending in (".mp4", ".MP4", ".mkv")]
            options = as_list(need(row, "options", path, number), path, number)
            lines = [need(row, "question", path, number), *options, "The best answer is:"]
            found.append(
                Sample(
                    id=str(need(row, "question_id", path, number)),
                    question=self._introduction() + "\n".join(lines),
                    video=self._clip(next((file for file in files if file.exists()), files[0])),
                    target=need(row, "answer", path, number),
                    group=video,
                    options=tuple("ABCD"),
                    meta={"kind": need(row, "duration", path, number)},
                )
            )
        return found

    def _introduction(self) -> str:
        return _ASKED.format(more="") + "\n"

    def _clip(self, file: Path) -> Clip:
        return Clip(file, self.frames)

    def read(self, sample: Sample, prediction: str) -> str | None:
        """The first capital of an option."""
        return first_capital(prediction, sample.options or ())


@register_task
class VideoMmeSubtitles(VideoMme):
    """The same questions, with what is said while the frames that are shown are on screen."""

    name = "videomme-subtitles"
    layout = VideoMme.layout + "; subtitle/VIDEOID.srt, which some videos do not have"

    def _introduction(self) -> str:
        head = f"This video's subtitles are listed below:\n{SUBTITLES}\n"
        return head + _ASKED.format(more=" and the subtitles") + "\n"

    def _clip(self, file: Path) -> Clip:
        return Clip(file, self.frames, subtitles=file.parent.parent / "subtitle" / f"{file.stem}.srt")
