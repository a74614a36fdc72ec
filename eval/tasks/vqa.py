"""VQAv2, TextVQA and VizWiz: free answers, compared with those of ten people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.scoring import vqa
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.reading import find, need, read_json

SHORT = "\nAnswer the question using a single word or phrase."


class _TenAnswers(Task):
    main_score = "accuracy"

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": vqa.accuracy_of_words(prediction, sample.target)}


@register_task
class VqaV2(_TenAnswers):
    """VQAv2, validation (arXiv 1612.00837)."""

    name = "vqav2"
    licence = "CC BY 4.0; images: COCO terms"
    source = "visualqa.org"
    layout = (
        "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json; val2014/COCO_val2014_*.jpg"
    )

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path = find(self, folder, "v2_OpenEnded_mscoco_val2014_questions.json")
        answers = find(self, folder, "v2_mscoco_val2014_annotations.json")
        known = {each["question_id"]: each for each in need(read_json(answers), "annotations", answers, 0)}
        found = []
        for number, record in enumerate(need(read_json(path), "questions", path, 0), 1):
            ident = need(record, "question_id", path, number)
            image = need(record, "image_id", path, number)
            answer = need(known, ident, answers, number)
            found.append(
                Sample(
                    id=str(ident),
                    question=need(record, "question", path, number) + SHORT,
                    images=(path.parent / "val2014" / f"COCO_val2014_{image:012d}.jpg",),
                    target=[each["answer"] for each in answer["answers"]],
                    group=str(image),
                    meta={"kind": answer["answer_type"]},
                )
            )
        return found

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": vqa.accuracy(prediction, sample.target)}


@register_task
class TextVqa(_TenAnswers):
    """TextVQA, validation, without OCR hints (arXiv 1904.08920)."""

    name = "textvqa"
    licence = "CC BY 4.0; images: Open Images, CC BY 2.0"
    source = "textvqa.org"
    layout = "TextVQA_0.5.1_val.json; train_images/IMAGE_ID.jpg"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path = find(self, folder, "TextVQA_0.5.1_val.json")
        return [
            Sample(
                id=str(need(record, "question_id", path, number)),
                question=need(record, "question", path, number).capitalize() + SHORT,
                images=(path.parent / "train_images" / f"{need(record, 'image_id', path, number)}.jpg",),
                target=list(need(record, "answers", path, number)),
                group=str(record["image_id"]),
            )
            for number, record in enumerate(need(read_json(path), "data", path, 0), 1)
        ]


@register_task
class VizWiz(_TenAnswers):
    """VizWiz, validation (arXiv 1802.08218)."""

    name = "vizwiz"
    licence = "CC BY 4.0"
    source = "vizwiz.org"
    layout = "val.json; val/*.jpg"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        path = find(self, folder, "val.json")
        unsure = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        return [
            Sample(
                id=need(record, "image", path, number),
                question=need(record, "question", path, number) + unsure + SHORT,
                images=(path.parent / "val" / record["image"],),
                target=[each["answer"] for each in need(record, "answers", path, number)],
            )
            for number, record in enumerate(read_json(path), 1)
        ]
