"""GQA, ChartQA and DocVQA: one right answer, or a few, and a rule for what counts as giving it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.scoring.answers import anls, relaxed
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.reading import find, need, read_json
from eval.tasks.vqa import SHORT


@register_task
class Gqa(Task):
    """GQA, balanced test-dev (arXiv 1902.09506): the answer word for word."""

    name = "gqa"
    licence = "CC BY 4.0"
    source = "cs.stanford.edu/people/dorarad/gqa"
    layout = "testdev_balanced_questions.json; images/IMAGE_ID.jpg"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path = find(self, folder, "testdev_balanced_questions.json")
        return [
            Sample(
                id=str(ident),
                question=need(record, "question", path, number) + SHORT,
                images=(path.parent / "images" / f"{need(record, 'imageId', path, number)}.jpg",),
                target=need(record, "answer", path, number),
                group=str(record["imageId"]),
            )
            for number, (ident, record) in enumerate(read_json(path).items(), 1)
        ]

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"score": float(prediction.strip().rstrip(".").lower() == sample.target)}


@register_task
class ChartQa(Task):
    """ChartQA, test (arXiv 2203.10244): numbers may be 5 % off."""

    name = "chartqa"
    licence = "GPL-3.0"
    source = "github.com/vis-nlp/ChartQA"
    layout = "test/test_human.json, test/test_augmented.json; test/png/*.png"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        found = []
        for part in ("human", "augmented"):
            path = find(self, folder, f"test/test_{part}.json")
            found += [
                Sample(
                    id=f"{part}-{number}",
                    question=need(record, "query", path, number) + SHORT,
                    images=(path.parent / "png" / need(record, "imgname", path, number),),
                    target=need(record, "label", path, number),
                    group=record["imgname"],
                    meta={"kind": part},
                )
                for number, record in enumerate(read_json(path), 1)
            ]
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"score": relaxed(prediction, sample.target)}


class _Anls(Task):
    max_new_tokens = 32
    main_score = "anls"
    files: tuple[str, ...]

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path = find(self, folder, *self.files)
        found = []
        for number, record in enumerate(need(read_json(path), "data", path, 0), 1):
            image = record["image"] if "image" in record else need(record, "image_local_name", path, number)
            found.append(
                Sample(
                    id=str(need(record, "questionId", path, number)),
                    question=need(record, "question", path, number) + SHORT,
                    images=(path.parent / ("" if "image" in record else "images") / image,),
                    target=list(need(record, "answers", path, number)),
                    group=image,
                )
            )
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"anls": anls(prediction, sample.target)}


@register_task
class DocVqa(_Anls):
    """DocVQA, validation (arXiv 2007.00398)."""

    name = "docvqa"
    licence = "terms of rrc.cvc.uab.es, research"
    source = "rrc.cvc.uab.es, challenge 17, task 1"
    layout = "val_v1.0_withQT.json or val_v1.0.json; documents/*.png"
    files = ("val_v1.0_withQT.json", "val_v1.0.json")


@register_task
class InfoVqa(_Anls):
    """InfographicVQA, validation (arXiv 2104.12756)."""

    name = "infovqa"
    licence = "terms of rrc.cvc.uab.es, research"
    source = "rrc.cvc.uab.es, challenge 17, task 3"
    layout = "infographicsVQA_val_v1.0_withQT.json or infographicsVQA_val_v1.0.json; images/*.jpeg"
    files = ("infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json")
