"""SEED-Bench, the questions about images. (arXiv 2307.16125)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.scoring.choice import first_character
from eval.tasks.base import Picture, Sample, register_task
from eval.tasks.lettered import LETTER, Lettered, lettered
from eval.tasks.reading import need, read_json
from eval.tasks.records import picture, records

_OFFICIAL = "SEED-Bench.json"


@register_task
class SeedBench(Lettered):
    """Four options, nine kinds of question."""

    name = "seedbench"
    licence = "CC BY-NC 4.0"
    source = "github.com/AILab-CVPR/SEED-Bench"
    layout = (
        "SEED-Bench.json, SEED-Bench-image/DATA_ID with any ending or none; or data/test-*.parquet with its columns; "
        "or SEEDBench_IMG.tsv (index, question, A to D, answer, category, image)"
    )

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        if folder is not None and (folder / _OFFICIAL).exists():
            return self._official(folder / _OFFICIAL)
        path, rows = records(self, folder, "data/test-*.parquet", "test-*.parquet", "SEEDBench_IMG.tsv", ".")
        found = []
        for number, row in enumerate(rows, 1):
            if "A" in row:
                row |= {f"choice_{letter.lower()}": row[letter] for letter in "ABCD" if letter in row}
                row |= {"question_id": need(row, "index", path, number), "question_type_id": row.get("category")}
            elif need(row, "data_type", path, number) != "image":
                continue
            found.append(_sample(row, path, number, row["question_type_id"], picture(row, path, number)))
        return found

    def _official(self, path: Path) -> list[Sample]:
        content = read_json(path)
        kinds = {number: name for name, number in content.get("question_type", {}).items()}
        files = {file.stem: file for file in (path.parent / "SEED-Bench-image").glob("*")}
        found = []
        for number, row in enumerate(need(content, "questions", path, 0), 1):
            if need(row, "data_type", path, number) == "image":
                kind = need(row, "question_type_id", path, number)
                name = need(row, "data_id", path, number)
                file = files.get(Path(name).stem, path.parent / "SEED-Bench-image" / name)
                found.append(_sample(row, path, number, kinds.get(kind, kind), file))
        return found

    def read(self, sample: Sample, prediction: str) -> str | None:
        """The first character."""
        return first_character(prediction, sample.options or ())


def _sample(row: Mapping[str, Any], path: Path, number: int, kind: Any, image: Picture) -> Sample:
    options = [need(row, f"choice_{letter}", path, number) for letter in "abcd"]
    return Sample(
        id=str(need(row, "question_id", path, number)),
        question=f"{need(row, 'question', path, number)}\n{lettered(options)}\n{LETTER}",
        images=(image,),
        target=need(row, "answer", path, number),
        group=str(row["data_id"]) if "data_id" in row else None,
        options=tuple("ABCD"),
        meta={"kind": str(kind)},
    )
