"""Makes small folders in the official layouts of the tasks: an image, one or two questions, one known answer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

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


def encoded() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def table(path: Path, rows: list[dict[str, Any]], image: str = "image") -> None:
    """A parquet file, or a folder as `datasets.save_to_disk` writes it, with a picture in every row."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    made = pyarrow.Table.from_pylist([{**row, image: {"bytes": encoded(), "path": None}} for row in rows])
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(made, path, row_group_size=2)
        return
    path.mkdir(parents=True, exist_ok=True)
    name = "data-00000-of-00001.arrow"
    write(path / "state.json", {"_data_files": [{"filename": name}], "_split": "test"})
    with pyarrow.OSFile(str(path / name), "wb") as file, pyarrow.ipc.new_stream(file, made.schema) as stream:
        stream.write_table(made, max_chunksize=2)


def files(folder: Path) -> None:
    text = base64.b64encode(encoded() * 20).decode()  # longer than any path
    rows = [
        {"question_id": "a", "image": "images/1.png", "question": "Which?", "answer": "cat", "kind": "word"},
        {"question_id": "b", "image": text, "question": "?", "answers": ["1", "one"]},
        {"question_id": "c", "image": ["images/1.png", "images/1.png"], "question": "Same?", "answer": "yes"},
    ]
    write(folder / "questions.jsonl", "\n".join(map(json.dumps, rows)))
    picture(folder / "images" / "1.png")


MAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pope": (pope, "yes"),
    "scienceqa-img": (scienceqa, "B"),
    "vqav2": (vqav2, "cat"),
    "textvqa": (textvqa, "cat"),
    "vizwiz": (vizwiz, "cat"),
    "chartqa": (chartqa, "10.2"),
    "docvqa": (docvqa, "cat"),
    "infovqa": (infovqa, "cat"),
    "files": (files, "Cat."),
}
"""By task: what makes its folder, and a right answer to its first question."""
