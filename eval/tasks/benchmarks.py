"""The benchmarks, each one row of data: files, prompt, fields of a record, scores and summary.

A row is enough for a new benchmark whose files `table` reads and whose answers `eval.scoring` scores. What a release
does in a way of its own has a small function above the rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import vtc
from eval.scoring import vqa
from eval.scoring.answers import anls, binary_figures, chosen_option, exact, relaxed, yes_or_no
from eval.tasks.base import Sample, Task, register_task
from eval.tasks.records import Record, find, read

Reader = Callable[[Task, Path | None], Iterable[Record]]
"""Returns the records of a task from its folder."""

Score = Callable[[str, Sample], float]
"""Scores a prediction for a sample."""

Summary = Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]
"""Aggregates rows with ``kind`` and ``scores``."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(Task):
    """A task that is described by data.

    Templates are format strings over the fields of a record. Two fields of a record are taken where a reader provides
    them: ``options``, the possible answers, and ``kind``, the category by which tables split scores.

    Attributes
    ----------
    name, licence, source, layout, max_new_tokens
        See `Task`.
    read : callable
        The reader of the records.
    id, question, image : str
        Templates of the sample's id, the prompt text, and the image's path below the folder.
    group : str or None
        Template of what several questions share; None where every question has an image of its own.
    answer : str
        The field with the reference answer or answers.
    scores : mapping of str to callable
        The scores by name, the main one first.
    summary : callable or None
        The aggregation; None takes the mean of each score.
    """

    name: str
    licence: str
    source: str
    layout: str
    read: Reader
    id: str
    question: str
    image: str
    group: str | None = None
    answer: str
    scores: Mapping[str, Score]
    summary: Summary | None = None
    max_new_tokens: int = 16

    @property
    def main_score(self) -> str:
        return next(iter(self.scores))

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        return [self._sample(record, folder or Path()) for record in self.read(self, folder)]

    def _sample(self, record: Record, folder: Path) -> Sample:
        return Sample(
            id=self.id.format_map(record),
            question=self.question.format_map(record),
            images=(folder / self.image.format_map(record),),
            target=record[self.answer],
            group=None if self.group is None else self.group.format_map(record),
            options=record.get("options"),
            meta={"kind": record["kind"]} if "kind" in record else {},
        )

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {name: score(prediction, sample) for name, score in self.scores.items()}

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return super().summarise(records) if self.summary is None else self.summary(records)


# ------------------------------------------------------------------------------------------------------------- readers


def table(*names: str, key: str | None = None, lines: bool = False, **constants: Any) -> Reader:
    """Return a reader of the first of these files that exists; `constants` become fields of every record.

    Parameters
    ----------
    *names : str
        See `records.find`.
    key, lines
        See `records.read`.
    **constants
    """

    def read_table(task: Task, folder: Path | None) -> Iterator[Record]:
        for path in find(task, folder, *names):
            for record in read(path, key, lines=lines):
                record.update(constants)
                yield record

    return read_table


def joined(*readers: Reader) -> Reader:
    """Return a reader of the records of several readers, one after the other."""
    return lambda task, folder: (record for reader in readers for record in reader(task, folder))


def derived(reader: Reader, **fields: Callable[[Record], Any]) -> Reader:
    """Return a reader that computes fields from each record."""

    def read_derived(task: Task, folder: Path | None) -> Iterator[Record]:
        for record in reader(task, folder):
            record.update({name: function(record) for name, function in fields.items()})
            yield record

    return read_derived


# ------------------------------------------------------------------------------------------- what one release has alone


def science_qa(task: Task, folder: Path | None) -> Iterator[Record]:
    """Read the questions with an image; a record is a conversation of two turns, with the options in the question."""
    for record in table("llava_test_CQM-A.json")(task, folder):
        if "image" in record:
            question, answer = (turn["value"] for turn in record["conversations"])
            text = question.replace("<image>", "").strip()
            options = tuple(re.findall(r"^([A-Z])\. ", text, re.MULTILINE))
            record.update(question=text, answer=answer, options=options)
            yield record


def vqa_v2(task: Task, folder: Path | None) -> Iterator[Record]:
    """Read the questions and look their answers up in the annotations, a file of its own."""
    annotations = table("v2_mscoco_val2014_annotations.json", key="annotations")
    questions = table("v2_OpenEnded_mscoco_val2014_questions.json", key="questions")
    by_question = {each["question_id"]: each for each in annotations(task, folder)}
    for record in questions(task, folder):
        annotation = by_question.get(record["question_id"])
        if annotation is None:
            raise record.error(f"question {record['question_id']} has no annotation")
        record.update(kind=annotation["answer_type"], answers=[each["answer"] for each in annotation["answers"]])
        yield record


def easy_vqa(task: Task, folder: Path | None) -> Iterator[Record]:
    """Read the test questions out of the package."""
    try:
        package = importlib.import_module("easy_vqa")
    except ModuleNotFoundError as error:
        raise vtc.InputError(f"{task.name} needs a package that is not installed: pip install easy-vqa") from error
    files, path = package.get_test_image_paths(), Path(package.__file__)
    for number, (text, answer, image) in enumerate(zip(*package.get_test_questions(), strict=True)):
        values = {
            "question": text[:1].upper() + text[1:],
            "answers": [answer],
            "image_id": image,
            "image": files[image],
            "kind": "yes or no" if answer in ("yes", "no") else "word",
        }
        yield Record(values, path, number)


def photos(task: Task, folder: Path | None) -> Iterator[Record]:
    """Read the project's own questions about photographs, and find the photographs in their packages."""
    for record in read(Path(__file__).parent / "photos.jsonl"):
        package, _, file = record["image"].partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise vtc.InputError(f"{task.name} needs packages: pip install scikit-image scikit-learn")
        path = Path(spec.origin).parent / file
        record.update(image=path, photo=path.stem)
        yield record


# ------------------------------------------------------------------------------------------------- scores and summaries


def against_target(function: Callable[[str, Any], float]) -> Score:
    """Return the score that `function` gives to a prediction and the sample's target."""
    return lambda prediction, sample: function(prediction, sample.target)


def right_option(prediction: str, sample: Sample) -> float:
    """Score multiple choice: 1 if the option that the answer names is the right one."""
    return float(chosen_option(prediction, sample.options or ()) == sample.target)


YES_NO: dict[str, Score] = {
    "accuracy": lambda prediction, sample: float(yes_or_no(prediction) == sample.target),
    "said_yes": lambda prediction, sample: float(yes_or_no(prediction) == "yes"),
    "is_yes": lambda prediction, sample: float(sample.target == "yes"),
}


def figures_per_kind(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Aggregate yes-or-no answers: the figures of each kind, and the mean over kinds of F1."""
    found, f1 = {}, []
    for kind in dict.fromkeys(record["kind"] for record in records):
        scores = [record["scores"] for record in records if record["kind"] == kind]
        sides = (["yes" if each[side] else "no" for each in scores] for side in ("said_yes", "is_yes"))
        figures = binary_figures(*sides)
        f1.append(figures["f1"])
        found |= {f"{kind}.{name}": value for name, value in figures.items()}
    return found | {"mean_f1": float(np.mean(f1))}


# ----------------------------------------------------------------------------------------------------------------- rows

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."

BENCHMARKS = (
    Benchmark(  # arXiv 2305.10355
        name="pope",
        licence="MIT; images: COCO terms",
        source="github.com/AoiDragon/POPE (output/coco) and COCO val2014",
        layout="coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json; val2014/COCO_val2014_*.jpg",
        read=joined(
            *(
                table(f"coco_pope_{split}.json", lines=True, kind=split, options=("yes", "no"))
                for split in ("random", "popular", "adversarial")
            )
        ),
        id="{kind}-{question_id}",
        question="{text}" + SHORT,
        image="val2014/{image}",
        group="{image}",
        answer="label",
        scores=YES_NO,
        summary=figures_per_kind,
    ),
    Benchmark(  # arXiv 2209.09513
        name="scienceqa-img",
        licence="CC BY-NC-SA 4.0",
        source="github.com/lupantech/ScienceQA; questions as LLaVA's evaluation bundle words them",
        layout="llava_test_CQM-A.json; images/test/ID/image.png",
        read=science_qa,
        id="{id}",
        question="{question}" + LETTER,
        image="images/test/{image}",
        answer="answer",
        scores={"score": right_option},
    ),
    Benchmark(  # validation; arXiv 1612.00837
        name="vqav2",
        licence="CC BY 4.0; images: COCO terms",
        source="visualqa.org",
        layout="v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json; "
        "val2014/COCO_val2014_*.jpg",
        read=vqa_v2,
        id="{question_id}",
        question="{question}" + SHORT,
        image="val2014/COCO_val2014_{image_id:012d}.jpg",
        group="{image_id}",
        answer="answers",
        scores={"accuracy": against_target(vqa.accuracy)},
    ),
    Benchmark(  # validation, without OCR hints; arXiv 1904.08920
        name="textvqa",
        licence="CC BY 4.0; images: Open Images, CC BY 2.0",
        source="textvqa.org",
        layout="TextVQA_0.5.1_val.json; train_images/IMAGE_ID.jpg",
        read=derived(
            table("TextVQA_0.5.1_val.json", key="data"), question=lambda record: record["question"].capitalize()
        ),
        id="{question_id}",
        question="{question}" + SHORT,
        image="train_images/{image_id}.jpg",
        group="{image_id}",
        answer="answers",
        scores={"accuracy": against_target(vqa.accuracy_of_words)},
    ),
    Benchmark(  # validation; arXiv 1802.08218
        name="vizwiz",
        licence="CC BY 4.0",
        source="vizwiz.org",
        layout="val.json; val/*.jpg",
        read=derived(table("val.json"), answers=lambda record: [each["answer"] for each in record["answers"]]),
        id="{image}",
        question="{question}" + UNSURE + SHORT,
        image="val/{image}",
        answer="answers",
        scores={"accuracy": against_target(vqa.accuracy_of_words)},
    ),
    Benchmark(  # test; arXiv 2203.10244
        name="chartqa",
        licence="GPL-3.0",
        source="github.com/vis-nlp/ChartQA",
        layout="test/test_human.json, test/test_augmented.json; test/png/*.png",
        read=joined(*(table(f"test/test_{part}.json", kind=part) for part in ("human", "augmented"))),
        id="{kind}-{number}",
        question="{query}" + SHORT,
        image="test/png/{imgname}",
        group="{imgname}",
        answer="label",
        scores={"score": against_target(relaxed)},
    ),
    Benchmark(  # validation; arXiv 2007.00398
        name="docvqa",
        licence="terms of rrc.cvc.uab.es, research",
        source="rrc.cvc.uab.es, challenge 17, task 1",
        layout="val_v1.0_withQT.json or val_v1.0.json; documents/*.png",
        read=table("val_v1.0_withQT.json", "val_v1.0.json", key="data"),
        id="{questionId}",
        question="{question}" + SHORT,
        image="{image}",
        group="{image}",
        answer="answers",
        scores={"anls": against_target(anls)},
        max_new_tokens=32,
    ),
    Benchmark(  # validation; arXiv 2104.12756
        name="infovqa",
        licence="terms of rrc.cvc.uab.es, research",
        source="rrc.cvc.uab.es, challenge 17, task 3",
        layout="infographicsVQA_val_v1.0_withQT.json or infographicsVQA_val_v1.0.json; images/*.jpeg",
        read=table("infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json", key="data"),
        id="{questionId}",
        question="{question}" + SHORT,
        image="images/{image_local_name}",
        group="{image_local_name}",
        answer="answers",
        scores={"anls": against_target(anls)},
        max_new_tokens=32,
    ),
    Benchmark(
        name="easy-vqa",
        licence="MIT",
        source="the package easy-vqa: pip install easy-vqa",
        layout="no files; the package carries them",
        read=easy_vqa,
        id="{number:05d}",
        question="{question}",
        image="{image}",
        group="{image_id}",
        answer="answers",
        scores={"exact": against_target(exact)},
        max_new_tokens=8,
    ),
    Benchmark(
        name="photos",
        licence="Apache-2.0; photographs as in scikit-image and scikit-learn, mostly public domain",
        source="the packages scikit-image and scikit-learn: pip install scikit-image scikit-learn",
        layout="no files; the packages carry them",
        read=photos,
        id="{question_id}",
        question="{question}" + SHORT,
        image="{image}",
        group="{photo}",
        answer="answers",
        scores={"exact": against_target(exact)},
    ),
)

for _benchmark in BENCHMARKS:
    register_task(_benchmark)
