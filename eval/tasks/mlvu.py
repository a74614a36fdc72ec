"""MLVU, dev, multiple choice: videos of minutes to hours. (arXiv 2406.04264)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.scoring.choice import first_word
from eval.tasks.base import Sample, register_task
from eval.tasks.lettered import VideoChoice, letter_of, lettered, letters_for
from eval.tasks.mvbench import ASKED
from eval.tasks.reading import find, need, read_json
from eval.tasks.video import Clip

PARTS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")


@register_task
class Mlvu(VideoChoice):
    """Seven kinds; the mean of their means (M-Avg) is the figure that papers print."""

    name = "mlvu"
    licence = "CC BY-NC-SA 4.0"
    source = "github.com/JUNJIE99/MLVU"
    layout = f"json/{PARTS[0]}.json to json/{PARTS[-1]}.json; video/{PARTS[0]}/*.mp4 and so on"
    kinds_count_alike = True

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        found = []
        for part in PARTS:
            path = find(self, folder, f"json/{part}.json")
            for number, record in enumerate(read_json(path), 1):
                options = [str(each) for each in need(record, "candidates", path, number)]
                video = need(record, "video", path, number)
                asked = f"Question: {need(record, 'question', path, number)}\nOptions:"
                found.append(
                    Sample(
                        id=f"{part}-{number}",
                        question=f"{asked}\n{lettered(options, '({letter}) {text}')}\n{ASKED}",
                        video=Clip(path.parent.parent / "video" / part / video, self.frames),
                        target=letter_of(str(need(record, "answer", path, number)), options, path, number),
                        group=f"{part}/{video}",  # names repeat from folder to folder
                        options=letters_for(options, path, number),
                        meta={"kind": part.split("_", 1)[1]},
                    )
                )
        return found

    def read(self, sample: Sample, prediction: str) -> str | None:
        """The first word."""
        return first_word(prediction, sample.options or ())
