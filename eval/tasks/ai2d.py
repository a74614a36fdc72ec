"""AI2D, test: diagrams out of school books. (arXiv 1603.07396)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.tasks.base import Sample, register_task
from eval.tasks.lettered import LETTER, Lettered, letter_at, lettered, letters_for
from eval.tasks.reading import need
from eval.tasks.records import as_list, picture, records


@register_task
class Ai2d(Lettered):
    """Four options; labels in the diagrams are letters in boxes, as the data set's authors masked them."""

    name = "ai2d"
    licence = "CC BY-SA 4.0"
    source = "allenai.org/data/diagrams, as tables of the test split"
    layout = (
        "data/test-*.parquet or test-*.parquet or an arrow folder (question, options, answer from 0, image), or "
        "AI2D_TEST.tsv (index, question, A to D, answer, image)"
    )

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path, rows = records(self, folder, "data/test-*.parquet", "test-*.parquet", "test", ".", "AI2D_TEST.tsv")
        found = []
        for number, row in enumerate(rows, 1):
            if "A" in row:
                options = [row[letter] for letter in "ABCD" if row.get(letter) is not None]
                answer = need(row, "answer", path, number)
            else:
                options = as_list(need(row, "options", path, number), path, number)
                letters = letters_for(options, path, number)
                answer = letter_at(need(row, "answer", path, number), letters, path, number)
            found.append(
                Sample(
                    id=str(row.get("index", number)),
                    question=f"{need(row, 'question', path, number)}\n{lettered(options)}\n{LETTER}",
                    images=(picture(row, path, number),),
                    target=answer,
                    options=letters_for(options, path, number),
                )
            )
        return found
