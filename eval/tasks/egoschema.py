"""EgoSchema, the 500 questions with published answers: three minutes of somebody's day. (arXiv 2308.09126)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.tasks.base import Sample, register_task
from eval.tasks.lettered import LETTER, VideoChoice, letter_at, lettered, letters_for
from eval.tasks.reading import find, need, read_json
from eval.tasks.video import Clip


@register_task
class EgoSchema(VideoChoice):
    """Five options; the other 4,531 questions have no published answers."""

    name = "egoschema"
    licence = "Ego4D licence"
    source = "github.com/egoschema/EgoSchema"
    layout = "questions.json, subset_answers.json; videos/Q_UID.mp4"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path, answers = find(self, folder, "questions.json"), find(self, folder, "subset_answers.json")
        known = read_json(answers)
        found = []
        for number, record in enumerate(read_json(path), 1):
            name = need(record, "q_uid", path, number)
            if name not in known:
                continue
            options = [need(record, f"option {place}", path, number) for place in range(5)]
            letters = letters_for(options, path, number)
            found.append(
                Sample(
                    id=name,
                    question=f"{need(record, 'question', path, number)}\n{lettered(options)}\n{LETTER}",
                    video=Clip(path.parent / "videos" / f"{name}.mp4", self.frames),
                    target=letter_at(known[name], letters, answers, number),
                    options=letters,
                )
            )
        return found
