"""MMStar: questions that cannot be answered without looking. (arXiv 2403.20330)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.scoring.choice import leading_letter
from eval.tasks.base import Sample, register_task
from eval.tasks.lettered import LETTER, Lettered, lettered
from eval.tasks.reading import need
from eval.tasks.records import picture, records


@register_task
class MmStar(Lettered):
    """Six kinds with 250 questions each; their mean is the figure that papers print."""

    name = "mmstar"
    licence = "see the source: built from MMMU, MMBench, ScienceQA, AI2D, SEED-Bench and MathVista"
    source = "github.com/MMStar-Benchmark/MMStar"
    layout = (
        "mmstar.parquet or val-*.parquet, there or in data/, an arrow folder, or MMStar.tsv (index, question, answer, "
        "category, image; A to D where the question does not list them)"
    )
    kinds_count_alike = True

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        names = ("mmstar.parquet", "data/mmstar.parquet", "data/val-*.parquet", "val-*.parquet", "val", ".")
        path, rows = records(self, folder, *names, "MMStar.tsv")
        found = []
        for number, row in enumerate(rows, 1):
            options = [row[letter] for letter in "ABCD" if row.get(letter) is not None]
            lines = [need(row, "question", path, number).strip(), *([lettered(options)] if options else []), LETTER]
            found.append(
                Sample(
                    id=str(need(row, "index", path, number)),
                    question="\n".join(lines),
                    images=(picture(row, path, number),),
                    target=need(row, "answer", path, number).strip().upper(),
                    options=tuple("ABCD"),
                    meta={"kind": need(row, "category", path, number)},
                )
            )
        return found

    def read(self, sample: Sample, prediction: str) -> str | None:
        """The leading letter."""
        return leading_letter(prediction, sample.options or ())
