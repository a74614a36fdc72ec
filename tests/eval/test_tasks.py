"""Every task reads a small folder in its official layout, and names what is missing from another folder."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

import vtc
from eval.scoring.answers import exact
from eval.tasks import Sample, get_task, names
from eval.tasks.__main__ import with_table
from eval.tasks.benchmarks import Benchmark, against_target, table
from tests import odd_pictures
from tests.eval import layouts
from tests.eval.layouts import MAKERS, pope, vizwiz, write

FROM_FILES = sorted(MAKERS)


def rows(name: str, samples: list[Sample], answers: list[str]) -> list[dict[str, Any]]:
    task = get_task(name)
    return [
        {"sample": s.id, "group": s.group or s.id, "kind": s.meta.get("kind"), "scores": task.score(s, a)}
        for s, a in zip(samples, answers, strict=True)
    ]


def test_every_task_is_tested_here() -> None:
    assert set(names()) == {
        *(*MAKERS, "scenes", "scene-descriptions", "hard-scenes", "picture-pairs"),
        *("clips", "clip-descriptions", "long-clips", "easy-vqa", "photos"),
    }


@pytest.mark.parametrize("name", FROM_FILES)
def test_official_layouts_are_read(name: str, tmp_path: Path) -> None:
    make, right = MAKERS[name]
    make(tmp_path)
    task = get_task(name)
    samples = task.samples(tmp_path)
    assert len({sample.id for sample in samples}) == len(samples) > 0
    first = samples[0]
    shown = first.open()
    assert shown.images[0].size == (8, 6)
    assert shown.images[0].getpixel((4, 3)) != (0, 0, 0)
    assert task.score(first, right)[task.main_score] == 1.0
    assert task.score(first, "nothing of the kind")[task.main_score] < 1.0 or name == "pope"
    summary = task.summarise(rows(name, list(samples), [right] * len(samples)))
    assert all(isinstance(value, float) for value in summary.values())


@pytest.mark.parametrize("name", FROM_FILES)
def test_the_error_about_an_empty_folder_states_the_layout(name: str, tmp_path: Path) -> None:
    task = get_task(name)
    with pytest.raises(vtc.InputError) as error:
        task.samples(tmp_path)
    assert task.layout in str(error.value)
    assert task.source in str(error.value)
    with pytest.raises(vtc.InputError, match="needs --data"):
        task.samples(None)


@pytest.mark.parametrize("name", [name for name in FROM_FILES if name != "files"])
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    make, _ = MAKERS[name]
    make(tmp_path)
    for path in sorted(tmp_path.rglob("*.json")):
        path.write_text(path.read_text().replace('"question"', '"ask"').replace('"text"', '"ask"'))
        path.write_text(path.read_text().replace('"query"', '"ask"').replace('"conversations"', '"ask"'))
    with pytest.raises(vtc.InputError, match=r"record \d: no '"):
        get_task(name).samples(tmp_path)


def test_broken_files_and_pictures_are_named(tmp_path: Path) -> None:
    vizwiz(tmp_path)
    (sample,) = get_task("vizwiz").samples(tmp_path)
    (tmp_path / "val" / "V_1.jpg").write_bytes(b"no picture")
    with pytest.raises(vtc.InputError, match=r"sample V_1.jpg: .*V_1.jpg: not a picture"):
        sample.open_images()
    (tmp_path / "val" / "V_1.jpg").unlink()
    with pytest.raises(vtc.InputError, match=r"V_1.jpg: no such file"):
        sample.open_images()
    for content, message in (("{", "not JSON"), ("{}", "expected a list of records")):
        write(tmp_path / "val.json", content)
        with pytest.raises(vtc.InputError, match=rf"val\.json: {message}"):
            get_task("vizwiz").samples(tmp_path)
    layouts.textvqa(tmp_path)
    write(tmp_path / "TextVQA_0.5.1_val.json", [])
    with pytest.raises(vtc.InputError, match="expected a list of records in 'data'"):
        get_task("textvqa").samples(tmp_path)


def test_a_question_without_annotation_is_named(tmp_path: Path) -> None:
    layouts.vqav2(tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    path.write_text(path.read_text().replace('"question_id": 10', '"question_id": 11'))
    with pytest.raises(vtc.InputError, match=r"questions\.json, record 1: question 10 has no annotation"):
        get_task("vqav2").samples(tmp_path)


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


def test_a_new_benchmark_is_one_row(tmp_path: Path) -> None:
    new = Benchmark(
        name="new",
        licence="none",
        source="the test",
        layout="test-*.parquet; images/*.png",
        read=table("test-*.parquet", kind="drawn"),
        id="{number}-{question}",
        question="{question}?",
        image="images/{name:03d}.png",
        answer="answer",
        scores={"exact": against_target(exact)},
    )
    for shard in range(2):
        layouts.table(tmp_path / f"test-{shard}.parquet", [{"question": f"q{shard}", "name": shard, "answer": ["x"]}])
    layouts.picture(tmp_path / "images" / "001.png")
    _, second = new.samples(tmp_path)
    assert (second.id, second.question, second.meta, second.group) == ("1-q1", "q1?", {"kind": "drawn"}, None)
    assert second.open_images()[0].size == (8, 6)
    assert new.main_score == "exact"
    assert new.summarise([{"scores": new.score(second, answer)} for answer in ("X.", "y")]) == {"exact": 0.5}


# ---------------------------------------------------------------------------------------------------- files of the user


def test_pictures_are_paths_base64_or_in_the_table(tmp_path: Path) -> None:
    layouts.files(tmp_path)
    samples = get_task("files").samples(tmp_path)
    assert [len(sample.open_images()) for sample in samples] == [1, 1, 2]
    assert [sample.target for sample in samples] == [["cat"], ["1", "one"], ["yes"]]
    for name in ("questions.parquet", "arrow"):
        folder = tmp_path / f"{name}-folder"
        layouts.table(folder / name if "." in name else folder, [{"question": "?", "answer": "x"}] * 5)
        samples = get_task("files").samples(folder)
        assert [sample.open_images()[0].size for sample in samples] == [(8, 6)] * 5


def test_text_tables_are_read_and_their_mistakes_named(tmp_path: Path) -> None:
    image = base64.b64encode(layouts.encoded() * 20).decode()
    lines = ["question\tanswers\toptions\timage", f"Which?\t['cat', 'dog']\t\t{image}"]
    write(tmp_path / "test.tsv", "\n".join(lines))
    (sample,) = get_task("files").samples(tmp_path)
    assert (sample.id, sample.target, sample.options) == ("1", ["cat", "dog"], None)
    assert sample.open_images()[0].size == (8, 6)
    write(tmp_path / "test.tsv", "\n".join(lines).replace("question\t", "ask\t"))
    with pytest.raises(vtc.InputError, match=r"test\.tsv, record 1: no 'question'; it has ask, answers"):
        get_task("files").samples(tmp_path)
    write(tmp_path / "test.tsv", "\n".join(lines).replace("['cat', 'dog']", "cat"))
    with pytest.raises(vtc.InputError, match=r"test\.tsv, record 1: expected a list, got 'cat'"):
        get_task("files").samples(tmp_path)
    write(tmp_path / "test.tsv", "\n".join(lines).replace(image, "%" * len(image)))
    (sample,) = get_task("files").samples(tmp_path)
    with pytest.raises(vtc.InputError, match="sample 1: image 0: not base64"):
        sample.open_images()
    (tmp_path / "test.tsv").unlink()
    write(tmp_path / "test.csv", 'question_id,question,answer,image\n7,"Which, then?",cat,a.png\n')
    (sample,) = get_task("files").samples(tmp_path)
    assert (sample.id, sample.question, sample.images) == ("7", "Which, then?", (tmp_path / "a.png",))


def test_a_picture_beside_a_table_is_found_or_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "?", "answer": "x", "image": {"bytes": None, "path": name}} for name in ("a.png", "b.png")]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"question": pyarrow.string(), "answer": pyarrow.string(), "image": kind})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "test.parquet")
    layouts.picture(tmp_path / "a.png")
    here, gone = get_task("files").samples(tmp_path)
    assert here.open_images()[0].size == (8, 6)
    with pytest.raises(vtc.InputError, match=r"sample 2: .*b\.png: no such file"):
        gone.open_images()


def test_pictures_are_upright_and_of_8_bits_wherever_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = odd_pictures.write(tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(layouts, "encoded", lambda: data)
    layouts.table(tmp_path / "table" / "questions.parquet", [{"question": "?", "answer": "x"}])
    rows = [{"question_id": 1, "image": base64.b64encode(data * 20).decode()}, {"question_id": 2, "image": "a.png"}]
    write(tmp_path / "questions.jsonl", "\n".join(json.dumps({**row, "question": "?", "answer": "x"}) for row in rows))
    for folder, count in ((tmp_path, 2), (tmp_path / "table", 1)):
        samples = get_task("files").samples(folder)
        assert [odd_pictures.is_right(sample.open_images()[0]) for sample in samples] == [True] * count


def test_a_broken_picture_in_a_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "encoded", lambda: b"no picture")
    layouts.table(tmp_path / "questions.parquet", [{"question": "?", "answer": "x"}])
    (sample,) = get_task("files").samples(tmp_path)
    with pytest.raises(vtc.InputError, match=r"sample 1: image 0: .*questions\.parquet, row 0: .*not a picture"):
        sample.open_images()


def test_nothing_to_show_and_double_names_are_errors(tmp_path: Path) -> None:
    write(tmp_path / "questions.jsonl", '{"question": "?", "answer": "x"}')
    with pytest.raises(vtc.InputError, match="record 1: neither an image nor a video"):
        get_task("files").samples(tmp_path)
    line = '{"question_id": 1, "question": "?", "answer": "x", "image": "a.png"}'
    write(tmp_path / "questions.jsonl", f"{line}\n{line}")
    with pytest.raises(vtc.InputError, match=r"1 question_id\(s\) occur more than once"):
        get_task("files").samples(tmp_path)
    write(tmp_path / "questions.parquet", "no table")
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(vtc.InputError, match=r"questions\.parquet: not a parquet file"):
        get_task("files").samples(tmp_path)


@pytest.mark.parametrize("kind", ["scenes", "clips"])
def test_generated_tasks_written_out_read_as_they_are_drawn(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    if kind == "scenes":
        from eval.tasks.scenes.writer import write as write_out

        drawn = get_task("scenes", pictures=2).samples(None)
    else:
        pytest.importorskip("av", reason="clips are written with PyAV")
        from eval.tasks.clips.files import write_task as write_out

        drawn = get_task("clips", pictures=2).samples(None)
    write_out(tmp_path, "test", 2)
    read = get_task("files").samples(tmp_path)
    assert [(s.question, s.target, s.options, s.meta["kind"]) for s in read] == [
        (s.question, [s.target], s.options, s.meta["kind"]) for s in drawn
    ]
    for here, there in zip(read, drawn, strict=True):
        if kind == "scenes":
            assert here.open_images()[0].tobytes() == there.open_images()[0].tobytes()
        else:
            ours, theirs = here.open().video, there.open().video
            assert (ours.indices, ours.total, ours.fps) == (theirs.indices, theirs.total, pytest.approx(theirs.fps))
            assert abs(ours.frames.astype(int) - theirs.frames.astype(int)).mean() < 12, "lossy, but the same frames"
        assert get_task("files").score(here, there.target) == {"exact": 1.0}


# ------------------------------------------------------------------------------------------------------------ packages


def test_photos_come_out_of_packages() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    samples = get_task("photos").samples(None)
    assert len({sample.id for sample in samples}) == len(samples) > 20
    assert all(min(sample.open_images()[0].size) > 100 for sample in samples)
    assert get_task("photos").score(samples[0], "Orange.") == {"exact": 1.0}


def test_easy_vqa_comes_out_of_its_package() -> None:
    pytest.importorskip("easy_vqa", reason="pip install easy-vqa")
    samples = get_task("easy-vqa").samples(None)
    assert len(samples) == 9673
    assert samples[0].open_images()[0].size == (64, 64)
    assert {answer for sample in samples for answer in sample.target} >= {"yes", "no", "circle", "teal"}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(vtc.InputError, match="pip install easy-vqa"):
        get_task("easy-vqa").samples(None)


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_the_table_that_the_tasks_make() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    assert with_table(page) == page, "run `python -m eval.tasks`"
    assert all(f"| `{name}` |" in page for name in names())
