"""NExT-QA, multiple choice: why, how and when things happen in home videos. (arXiv 2105.08276)"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.tasks.base import Sample, register_task
from eval.tasks.lettered import LETTER, VideoChoice, letter_at, lettered, letters_for
from eval.tasks.reading import find, need, read_json
from eval.tasks.records import records
from eval.tasks.video import Clip


@register_task
class NextQa(VideoChoice):
    """Five options; figures for causal (C), temporal (T) and descriptive (D) questions as papers print them."""

    name = "nextqa"
    licence = "MIT; videos of VidOR under its terms"
    source = "github.com/doc-doc/NExT-QA (dataset/nextqa)"
    layout = "test.csv or val.csv (video, question, answer, qid, type, a0 to a4); map_vid_vidorID.json; NExTVideo/"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path, rows = records(self, folder, "test.csv", "val.csv")
        places = read_json(find(self, folder, "map_vid_vidorID.json"))
        found = []
        for number, row in enumerate(rows, 1):
            options = [need(row, f"a{place}", path, number) for place in range(5)]
            letters = letters_for(options, path, number)
            video = str(need(row, "video", path, number))
            found.append(
                Sample(
                    id=f"{video}-{need(row, 'qid', path, number)}",
                    question=f"{need(row, 'question', path, number)}\n{lettered(options)}\n{LETTER}",
                    video=Clip(path.parent / "NExTVideo" / f"{need(places, video, path, number)}.mp4", self.frames),
                    target=letter_at(need(row, "answer", path, number), letters, path, number),
                    group=video,
                    options=letters,
                    meta={"kind": need(row, "type", path, number)},
                )
            )
        return found

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        groups = defaultdict(list)
        for record in records:
            groups[record["kind"][0]].append(record["scores"]["accuracy"])
        return super().summarise(records) | {name: float(np.mean(hits)) for name, hits in groups.items()}
