"""Small folders in the official layouts of the tasks: a picture or a clip, a question or two, one known answer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from eval.tasks.mlvu import PARTS
from eval.tasks.mme import COGNITION, PERCEPTION
from eval.tasks.mvbench import FOLDERS
from tests.video import clips

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
        ("4", "Who?", "Look.", "x", "y", "z", "", "C", "people", image),
        ("1000003", "Which?", "", "dog", "cat", "", "", "B", "animals", "3"),  # releases put rotations last
    ]
    write(folder / name, "\n".join("\t".join(row) for row in rows))


def mmbench_parquet(folder: Path) -> None:
    row = {"question": "Which?", "hint": "nan", "A": "cat", "B": "dog", "C": "nan", "D": "nan", "category": "animals"}
    rows = [{**row, "index": 3, "answer": "A"}, {**row, "index": 1000003, "A": "dog", "B": "cat", "answer": "B"}]
    table(folder / "en" / "dev-00000-of-00001.parquet", rows)


def mmbench_cn(folder: Path) -> None:
    mmbench(folder, "MMBench_DEV_CN.tsv")


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


def tsv(path: Path, rows: list[dict[str, str]]) -> None:
    image = base64.b64encode(encoded()).decode()
    lines = [[*rows[0], "image"], *([*row.values(), image] for row in rows)]
    write(path, "\n".join("\t".join(line) for line in lines))


def seedbench(folder: Path) -> None:
    row = {"question": "Which?", "answer": "B", "question_type_id": 1, "data_type": "image", "data_id": "12"}
    row |= {f"choice_{letter}": f"{letter}at" for letter in "abcd"}
    video = {**row, "question_id": "v1", "data_type": "video"}
    rows = [video, {**row, "question_id": "101"}, {**row, "question_id": "102", "question_type_id": 2}]
    kinds = {"Scene Understanding": 1, "Instance Identity": 2}
    write(folder / "SEED-Bench.json", {"questions": rows, "question_type": kinds})
    picture(folder / "SEED-Bench-image" / "12.jpg")


def seedbench_parquet(folder: Path) -> None:
    row = {"question": "Which?", "answer": "B", "question_type_id": 1, "data_type": "image", "data_id": "12"}
    row |= {f"choice_{letter}": f"{letter}at" for letter in "abcd"}
    rows = [{**row, "question_id": str(number)} for number in range(5)]
    table(folder / "data" / "test-00000-of-00002.parquet", rows[:3])
    table(folder / "data" / "test-00001-of-00002.parquet", rows[3:])


def lettered_tsv(name: str) -> Callable[[Path], None]:
    row = {"index": "0", "question": "Which?", "A": "cat", "B": "dog", "C": "cow", "D": "hen"}
    rows = [
        {**row, "answer": "B", "category": "coarse perception"},
        {**row, "index": "1", "answer": "A", "category": "math"},
        {**row, "index": "2", "answer": "A", "category": "math"},
    ]
    return lambda folder: tsv(folder / name, rows)


def mmstar(folder: Path) -> None:
    row = {"question": "Which?\nOptions: A: cat, B: dog", "answer": "B", "category": "math", "l2_category": "geometry"}
    table(folder / "data" / "mmstar.parquet", [{**row, "index": 0}, {**row, "index": 1, "category": "logic"}])


def ai2d(folder: Path) -> None:
    row = {"question": "Which?", "options": ["cat", "dog", "cow", "hen"], "answer": "1"}
    table(folder, [row, row, row])


def ocrbench(folder: Path) -> None:
    row = {"dataset_name": "IIIT5K", "question": "what is written in the image?", "image_path": "a/1.png"}
    formula = "Handwritten Mathematical Expression Recognition"
    rows = [
        {**row, "id": 0, "answers": ["CENTRE"], "type": "Regular Text Recognition"},
        {**row, "id": 1, "answers": "x ^ { 2 }", "type": formula},
        {**row, "id": 2, "answers": ["7", "seven"], "type": "Scene Text-centric VQA"},
    ]
    write(folder / "OCRBench.json", rows)
    picture(folder / "OCRBench_Images" / "a" / "1.png")


def ocrbench_parquet(folder: Path) -> None:
    row = {"dataset": "IIIT5K", "question": "what is written?", "question_type": "Regular Text Recognition"}
    table(folder / "data" / "test-00000-of-00001.parquet", [{**row, "answer": ["CENTRE"]}])


def mmvet(folder: Path) -> None:
    record = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5<OR>none", "capability": ["math"]}
    write(folder / "mm-vet.json", {"v1_0": record})
    picture(folder / "images" / "v1_0.png")


def files(folder: Path) -> None:
    text = base64.b64encode(encoded() * 20).decode()  # longer than any path
    rows = [
        {"question_id": "a", "image": "images/1.png", "question": "Which?", "answer": "cat", "kind": "word"},
        {
            "question_id": "b",
            "image": text,
            "question": "?",
            "answers": ["1", "one"],
        },
        {"question_id": "c", "image": ["images/1.png", "images/1.png"], "question": "Same?", "answer": "yes"},
    ]
    write(folder / "questions.jsonl", "\n".join(map(json.dumps, rows)))
    picture(folder / "images" / "1.png")


def film(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    clips.write(path, clips.frames(12), fps=4)


CANDIDATES = {"question": "What happens?", "candidates": ["He sits.", "He stands.", "He runs."], "answer": "He stands."}


def mvbench(folder: Path) -> None:
    for kind in FOLDERS:
        write(folder / "json" / f"{kind}.json", [{"video": "a.mp4", "start": 1.0, "end": 2.0, **CANDIDATES}])
    film(folder / "video" / "star" / "Charades_v1_480" / "a.mp4")


def mlvu(folder: Path) -> None:
    for part in PARTS:
        write(folder / "json" / f"{part}.json", [{"video": "a.mp4", "duration": 3.0, **CANDIDATES}])
    film(folder / "video" / PARTS[0] / "a.mp4")


def egoschema(folder: Path) -> None:
    options = {f"option {place}": f"C does {place}" for place in range(5)}
    records = [{"q_uid": name, "google_drive_id": "x", "question": "What does C do?", **options} for name in "uvw"]
    write(folder / "questions.json", records)
    write(folder / "subset_answers.json", {"v": 1})
    film(folder / "videos" / "v.mp4")


def nextqa(folder: Path) -> None:
    columns = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
    rows = ['44,12,64,48,why did he sit,1,6,CW,tired,"ill, and old",sad,glad,mad']
    rows.append("44,12,64,48,what came after,0,7,TN,x,y,z,u,v")
    write(folder / "val.csv", "\n".join([columns, *rows]))
    write(folder / "map_vid_vidorID.json", {"44": "1000/44"})
    film(folder / "NExTVideo" / "1000" / "44.mp4")


def perceptiontest(folder: Path) -> None:
    question = {"id": 0, "question": "What moves?", "options": ["cup", "ball", "no"], "answer_id": 1, "area": "physics"}
    write(folder / "mc_question_valid.json", {"video_1": {"metadata": {}, "mc_question": [question]}})
    film(folder / "videos" / "video_1.mp4")


def longvideobench(folder: Path) -> None:
    record = {"id": "a_0", "video_path": "a.mp4", "question": "When?", "candidates": ["x", "y", "z"]}
    write(folder / "lvb_val.json", [{**record, "correct_choice": 1, "duration_group": 15}])
    film(folder / "videos" / "a.mp4")


def videomme(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    row = {"videoID": "abc", "question": "Who?", "options": ["A. x", "B. y", "C. z", "D. w"], "answer": "B"}
    rows = [{**row, "question_id": "001-1", "duration": "short"}, {**row, "question_id": "601-1", "duration": "long"}]
    (folder / "videomme").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "videomme" / "test-00000-of-00001.parquet")
    film(folder / "data" / "abc.mp4")
    subtitles = "1\n00:00:00,000 --> 00:00:01,500\n<i>Hello</i>\nthere\n\n2\n00:00:30,000 --> 00:00:40,000\nlate\n"
    write(folder / "subtitle" / "abc.srt", subtitles)


MAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
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
    "mmbench-circular": (mmbench, "A"),
    "mmbench-cn-circular": (mmbench_cn, "A"),
    "seedbench": (seedbench, "B. dog"),
    "mmstar": (mmstar, "(B)"),
    "ai2d": (ai2d, "B"),
    "ocrbench": (ocrbench, "It says: centre."),
    "mmvet-contained": (mmvet, "x is -1 or -5"),
    "files": (files, "Cat."),
    "mvbench": (mvbench, "(B) He stands."),
    "mlvu": (mlvu, "B)"),
    "egoschema": (egoschema, "B"),
    "nextqa": (nextqa, "B"),
    "perceptiontest": (perceptiontest, "It is B"),
    "longvideobench": (longvideobench, "The answer is B."),
    "videomme": (videomme, "B. y"),
    "videomme-subtitles": (videomme, "B"),
}
"""By task: what makes its folder, and a right answer to its first question."""

OTHERS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "mmbench-circular, parquet": ("mmbench-circular", mmbench_parquet, "cat"),
    "seedbench, parquet in two shards": ("seedbench", seedbench_parquet, "b"),
    "seedbench, TSV": ("seedbench", lettered_tsv("SEEDBench_IMG.tsv"), "B"),
    "mmstar, TSV": ("mmstar", lettered_tsv("MMStar.tsv"), "the answer is b"),
    "ai2d, TSV": ("ai2d", lettered_tsv("AI2D_TEST.tsv"), "B."),
    "ocrbench, parquet": ("ocrbench", ocrbench_parquet, "centre"),
}
"""The other containers that a task's release comes in."""
