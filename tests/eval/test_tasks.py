"""Every task reads a small folder in its official layout, and says what is missing from one that is not."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("pandas")

import vtc
from eval.tasks import Sample, get_task, names
from eval.tasks.mme import COGNITION, PERCEPTION

TEN = ["cat"] * 7 + ["dog"] * 3


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 10, 10)).save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def pope(folder: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a cat in the image?", "label": "yes"},
            {"question_id": 2, "image": "COCO_1.jpg", "text": "Is there a dog in the image?", "label": "no"},
        ]
        write(folder / f"coco_pope_{split}.json", "\n".join(map(json.dumps, lines)))
    picture(folder / "val2014" / "COCO_1.jpg")


def scienceqa(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. cat\nB. dog"}, {"from": "gpt", "value": "B"}]
    text = [{"from": "human", "value": "Which?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
    records = [{"id": "5", "image": "5/image.png", "conversations": turns}, {"id": "6", "conversations": text}]
    write(folder / "llava_test_CQM-A.json", records)
    picture(folder / "images" / "test" / "5" / "image.png")


def vqav2(folder: Path) -> None:
    question = {"question_id": 10, "image_id": 42, "question": "What is it?"}
    answer = {"question_id": 10, "answer_type": "other", "answers": [{"answer": each} for each in TEN]}
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [question]})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": [answer]})
    picture(folder / "val2014" / "COCO_val2014_000000000042.jpg")


def textvqa(folder: Path) -> None:
    record = {"question_id": 1, "image_id": "ab", "question": "what is it?", "answers": TEN}
    write(folder / "TextVQA_0.5.1_val.json", {"data": [record]})
    picture(folder / "train_images" / "ab.jpg")


def vizwiz(folder: Path) -> None:
    record = {"image": "V_1.jpg", "question": "What is it?", "answers": [{"answer": each} for each in TEN]}
    write(folder / "val.json", [record])
    picture(folder / "val" / "V_1.jpg")


def gqa(folder: Path) -> None:
    write(folder / "testdev_balanced_questions.json", {"1": {"imageId": "n1", "question": "What?", "answer": "cat"}})
    picture(folder / "images" / "n1.jpg")


def chartqa(folder: Path) -> None:
    for part in ("human", "augmented"):
        write(folder / "test" / f"test_{part}.json", [{"imgname": "1.png", "query": "How many?", "label": "10"}])
    picture(folder / "test" / "png" / "1.png")


def docvqa(folder: Path) -> None:
    record = {"questionId": 7, "question": "Who?", "image": "documents/a.png", "answers": ["cat"]}
    write(folder / "val_v1.0.json", {"data": [record]})
    picture(folder / "documents" / "a.png")


def infovqa(folder: Path) -> None:
    record = {"questionId": 7, "question": "Who?", "image_local_name": "a.jpeg", "answers": ["cat"]}
    write(folder / "infographicsVQA_val_v1.0_withQT.json", {"data": [record]})
    picture(folder / "images" / "a.jpeg")


def mme(folder: Path) -> None:
    for category in (*PERCEPTION, *COGNITION):
        write(folder / category / "questions_answers_YN" / "p.txt", "Is it a cat?\tYes\nIs it a dog?\tNo\n")
        picture(folder / category / "images" / "p.jpg")


def mmbench(folder: Path, name: str = "MMBench_DEV_EN.tsv") -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    rows = [
        ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"),
        ("3", "Which?", "", "cat", "dog", "", "", "A", "animals", image),
        ("1000003", "Which?", "", "dog", "cat", "", "", "B", "animals", "3"),
        ("4", "Who?", "Look.", "x", "y", "z", "", "C", "people", image),
    ]
    write(folder / name, "\n".join("\t".join(row) for row in rows))


def mmbench_cn(folder: Path) -> None:
    mmbench(folder, "MMBench_DEV_CN.tsv")


MAKERS = {
    "pope": (pope, "yes"),
    "scienceqa-img": (scienceqa, "B"),
    "vqav2": (vqav2, "cat"),
    "textvqa": (textvqa, "cat"),
    "vizwiz": (vizwiz, "cat"),
    "gqa": (gqa, "cat"),
    "chartqa": (chartqa, "10.2"),
    "docvqa": (docvqa, "cat"),
    "infovqa": (infovqa, "cat"),
    "mme": (mme, "Yes"),
    "mmbench": (mmbench, "A"),
    "mmbench-cn": (mmbench_cn, "A"),
}
FROM_FILES = sorted(MAKERS)


def rows(name: str, samples: list[Sample], answers: list[str]) -> list[dict[str, Any]]:
    task = get_task(name)
    return [
        {"group": s.group or s.id, "kind": s.meta.get("kind"), "prediction": a, "scores": task.score(s, a)}
        for s, a in zip(samples, answers, strict=True)
    ]


def test_every_task_is_tried_here() -> None:
    assert set(names()) == {*MAKERS, "scenes", "clips"}


@pytest.mark.parametrize("name", FROM_FILES)
def test_official_layouts_are_read(name: str, tmp_path: Path) -> None:
    make, right = MAKERS[name]
    make(tmp_path)
    task = get_task(name)
    samples = task.samples(tmp_path)
    assert len({sample.id for sample in samples}) == len(samples) > 0
    first = samples[0]
    assert first.open_images()[0].size == (8, 6)
    assert task.score(first, right)[task.main_score] == 1.0
    assert task.score(first, "nothing of the kind")[task.main_score] < 1.0 or name == "pope"
    summary = task.summarise(rows(name, list(samples), [right] * len(samples)))
    assert all(isinstance(value, float) for value in summary.values())


@pytest.mark.parametrize("name", FROM_FILES)
def test_an_empty_folder_is_told_the_layout(name: str, tmp_path: Path) -> None:
    task = get_task(name)
    with pytest.raises(vtc.InputError) as error:
        task.samples(tmp_path)
    assert task.layout in str(error.value)
    assert task.source in str(error.value)
    with pytest.raises(vtc.InputError, match="needs --data"):
        task.samples(None)


@pytest.mark.parametrize("name", [n for n in FROM_FILES if n not in ("mmbench", "mmbench-cn", "mme")])
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    make, _ = MAKERS[name]
    make(tmp_path)
    for path in sorted(tmp_path.rglob("*.json")):
        path.write_text(path.read_text().replace('"question"', '"ask"').replace('"text"', '"ask"'))
        path.write_text(path.read_text().replace('"query"', '"ask"').replace('"conversations"', '"ask"'))
    with pytest.raises(vtc.InputError, match=r"record 1: no '"):
        get_task(name).samples(tmp_path)


def test_a_missing_column_and_a_wrong_line_are_named(tmp_path: Path) -> None:
    mmbench(tmp_path)
    table = tmp_path / "MMBench_DEV_EN.tsv"
    table.write_text(table.read_text().replace("answer\t", "solution\t", 1))
    with pytest.raises(vtc.InputError, match="no column answer"):
        get_task("mmbench").samples(tmp_path)
    mme(tmp_path)
    write(tmp_path / "count" / "questions_answers_YN" / "p.txt", "Is it a cat? Yes\n")
    with pytest.raises(vtc.InputError, match=r"p\.txt, line 1"):
        get_task("mme").samples(tmp_path)


def test_broken_files_and_pictures_are_named(tmp_path: Path) -> None:
    gqa(tmp_path)
    (sample,) = get_task("gqa").samples(tmp_path)
    (tmp_path / "images" / "n1.jpg").write_bytes(b"no picture")
    with pytest.raises(vtc.InputError, match=r"sample 1: .*n1.jpg: not a picture"):
        sample.open_images()
    (tmp_path / "images" / "n1.jpg").unlink()
    with pytest.raises(vtc.InputError, match=r"n1.jpg: no such file"):
        sample.open_images()
    write(tmp_path / "testdev_balanced_questions.json", "{")
    with pytest.raises(vtc.InputError, match=r"testdev_balanced_questions.json: not JSON"):
        get_task("gqa").samples(tmp_path)
    mmbench(tmp_path)
    table = tmp_path / "MMBench_DEV_EN.tsv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], "9\tWhich?\t\ta\tb\t\t\tA\tx\t%%%"]))
    (sample,) = get_task("mmbench").samples(tmp_path)
    with pytest.raises(vtc.InputError, match="sample 9: image 0: not base64"):
        sample.open_images()


def test_pope_figures_are_per_split(tmp_path: Path) -> None:
    pope(tmp_path)
    samples = list(get_task("pope").samples(tmp_path))
    answers = ["Yes", "Yes", "Yes", "No", "No", "No"]  # random, popular, adversarial: yes and no questions in turn
    summary = get_task("pope").summarise(rows("pope", samples, answers))
    assert summary["random.f1"] == pytest.approx(2 / 3)
    assert summary["popular.f1"] == 1.0
    assert summary["adversarial.f1"] == 0.0
    assert summary["mean_f1"] == pytest.approx(5 / 9)
    assert summary["random.yes_ratio"] == 1.0


def test_mme_adds_accuracy_and_whole_pictures(tmp_path: Path) -> None:
    mme(tmp_path)
    samples = list(get_task("mme").samples(tmp_path))
    perfect = get_task("mme").summarise(rows("mme", samples, ["Yes", "No"] * 14))
    assert perfect["perception"] == 2000
    assert perfect["cognition"] == 800
    always_yes = get_task("mme").summarise(rows("mme", samples, ["Yes"] * 28))
    assert always_yes["count"] == 50
    assert always_yes["perception"] == 500


def test_mmbench_counts_a_question_once_for_all_rotations(tmp_path: Path) -> None:
    mmbench(tmp_path)
    task = get_task("mmbench")
    samples = list(task.samples(tmp_path))
    assert [sample.options for sample in samples] == [("A", "B"), ("A", "B"), ("A", "B", "C")]
    assert samples[1].open_images()[0].size == (8, 6), "a rotation borrows the picture"
    assert samples[2].question.startswith("Look.\nWho?\nA. x\n")
    summary = task.summarise(rows("mmbench", samples, ["A", "A", "C"]))
    assert summary == {"accuracy": pytest.approx(2 / 3), "circular": 0.5}


def test_the_page_names_every_task() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    table = page.split("## Tasks\n", 1)[1]
    lines = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    told = {line[1].strip().strip("`"): (line[2].strip(), line[3].strip(), line[4].strip()) for line in lines}
    tasks = {name: get_task(name) for name in names()}
    assert told == {name: (task.layout, task.source, task.licence) for name, task in tasks.items()}
