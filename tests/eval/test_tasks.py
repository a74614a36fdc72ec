"""Every task reads a small folder in its official layout, and says what is missing from one that is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("av", reason="videos are written with PyAV")

import vtc
from eval.tasks import Sample, get_task, names
from eval.tasks.__main__ import with_table
from tests.eval import layouts
from tests.eval.layouts import MAKERS, OTHERS, gqa, mmbench, mme, pope, write

FROM_FILES = sorted(MAKERS)
NOT_JSON = {"mme", "ai2d", "mmstar", "nextqa", "files", "videomme", "videomme-subtitles"}
NOT_JSON |= {"mmbench", "mmbench-cn", "mmbench-circular", "mmbench-cn-circular"}
FOLDERS = {**{name: (name, *made) for name, made in MAKERS.items()}, **OTHERS}


def rows(name: str, samples: list[Sample], answers: list[str]) -> list[dict[str, Any]]:
    task = get_task(name)
    return [
        {"sample": s.id, "group": s.group or s.id, "kind": s.meta.get("kind"), "scores": task.score(s, a)}
        for s, a in zip(samples, answers, strict=True)
    ]


def test_every_task_is_tried_here() -> None:
    assert set(names()) == {*MAKERS, "scenes", "clips", "easy-vqa", "photos"}


@pytest.mark.parametrize("case", FOLDERS)
def test_official_layouts_are_read(case: str, tmp_path: Path) -> None:
    name, make, right = FOLDERS[case]
    make(tmp_path)
    task = get_task(name)
    samples = task.samples(tmp_path)
    assert len({sample.id for sample in samples}) == len(samples) > 0
    first = samples[0]
    shown = first.open()
    if task.modality == "video":
        assert shown.video is not None
        assert shown.video.frames.shape[1:] == (48, 64, 3)
        assert not shown.images
    else:
        assert shown.images[0].size == (8, 6)
        assert shown.images[0].getpixel((4, 3)) != (0, 0, 0) or "mmbench" in name
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


@pytest.mark.parametrize("name", [name for name in FROM_FILES if name not in NOT_JSON])
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    make, _ = MAKERS[name]
    make(tmp_path)
    for path in sorted(tmp_path.rglob("*.json")):
        path.write_text(path.read_text().replace('"question"', '"ask"').replace('"text"', '"ask"'))
        path.write_text(path.read_text().replace('"query"', '"ask"').replace('"conversations"', '"ask"'))
    with pytest.raises(vtc.InputError, match=r"record \d: no '"):
        get_task(name).samples(tmp_path)


def test_a_missing_column_and_a_wrong_line_are_named(tmp_path: Path) -> None:
    mmbench(tmp_path)
    table = tmp_path / "MMBench_DEV_EN.tsv"
    table.write_text(table.read_text().replace("answer\t", "solution\t", 1))
    with pytest.raises(vtc.InputError, match=r"record 1: no 'answer'"):
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


def test_mmbench_takes_each_question_once_or_in_every_rotation(tmp_path: Path) -> None:
    mmbench(tmp_path)
    once = list(get_task("mmbench").samples(tmp_path))
    assert [sample.options for sample in once] == [("A", "B"), ("A", "B", "C")]
    assert once[1].question.startswith("Look.\nWho?\nA. x\n")
    circular = get_task("mmbench-circular")
    samples = list(circular.samples(tmp_path))
    assert [sample.id for sample in samples] == ["3", "1000003", "4"], "a question's rotations stand together"
    assert samples[1].open_images()[0].size == (8, 6), "a rotation borrows the picture"
    summary = circular.summarise(rows("mmbench-circular", samples, ["A", "A", "C"]))
    assert summary == {"circular": 0.5, "accuracy": pytest.approx(2 / 3), "vanilla": 1.0}


def test_mmbench_is_rotated_where_its_release_is_not(tmp_path: Path) -> None:
    mmbench(tmp_path)
    table = tmp_path / "MMBench_DEV_EN.tsv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.startswith("1000003")))
    circular = get_task("mmbench-circular")
    samples = [sample for sample in circular.samples(tmp_path) if sample.group == "4"]
    assert [sample.target for sample in samples] == ["C", "A", "B"]
    assert [sample.id for sample in samples] == ["4", "1000004", "2000004"]
    assert [sample.question.split("\n")[2:5] for sample in samples] == [
        ["A. x", "B. y", "C. z"],
        ["A. z", "B. x", "C. y"],
        ["A. y", "B. z", "C. x"],
    ]
    always_c = circular.summarise(rows("mmbench-circular", samples, ["C"] * 3))
    assert always_c == {"circular": 0.0, "accuracy": pytest.approx(1 / 3), "vanilla": 1.0}


def test_mmbench_leaves_out_what_a_table_calls_nan(tmp_path: Path) -> None:
    layouts.mmbench_parquet(tmp_path)
    first = get_task("mmbench").samples(tmp_path)[0]
    assert first.options == ("A", "B")
    assert "nan" not in first.question


def test_mme_questions_end_as_llava_asks_them(tmp_path: Path) -> None:
    mme(tmp_path)
    write(tmp_path / "count" / "questions_answers_YN" / "p.txt", "Is it? Please answer yes or no.\tYes\nNo?\tNo\n")
    asked = {sample.id: sample.question for sample in get_task("mme").samples(tmp_path)}
    assert asked["count-p-1"] == "Is it?\nAnswer the question using a single word or phrase."


def test_mvbench_shows_the_piece_that_is_asked_about(tmp_path: Path) -> None:
    layouts.mvbench(tmp_path)
    first = get_task("mvbench", frames=2).samples(tmp_path)[0]
    shown = first.open().video
    assert shown is not None
    assert shown.indices == (5, 7), "from 1 s to 2 s of 4 frames a second"
    assert first.question.split("\n")[1:3] == ["Options:", "(A) He sits."]


def test_subtitles_are_those_of_the_frames_that_are_shown(tmp_path: Path) -> None:
    layouts.videomme(tmp_path)
    sample = get_task("videomme-subtitles").samples(tmp_path)[0]
    asked = sample.asked(sample.open())
    assert "listed below:\nHello there\nSelect the best answer" in asked
    assert "late" not in asked
    one_late_frame = get_task("videomme-subtitles", frames=1).samples(tmp_path)[0]
    assert "Hello" not in one_late_frame.asked(one_late_frame.open())
    (tmp_path / "subtitle" / "abc.srt").unlink()
    assert "No subtitles available" in sample.asked(sample.open())
    write(tmp_path / "subtitle" / "abc.srt", "1\nHello\n")
    with pytest.raises(vtc.InputError, match=r"abc\.srt, subtitle 1: no times"):
        sample.open()


def test_kinds_may_count_alike(tmp_path: Path) -> None:
    layouts.lettered_tsv("MMStar.tsv")(tmp_path)
    samples = list(get_task("mmstar").samples(tmp_path))  # one of coarse perception, two of math
    figures = get_task("mmstar").summarise(rows("mmstar", samples, ["B", "A", "C"]))
    assert figures == {"accuracy": 2 / 3, "coarse perception": 1.0, "math": 0.5, "mean_of_kinds": 0.75}


def test_ocrbench_counts_points(tmp_path: Path) -> None:
    layouts.ocrbench(tmp_path)
    samples = list(get_task("ocrbench").samples(tmp_path))
    figures = get_task("ocrbench").summarise(rows("ocrbench", samples, ["centre", "x^{2}", "eight"]))
    assert figures["points"] == 2.0
    assert figures["Text Recognition"] == 1.0
    assert figures["Scene Text-centric VQA"] == 0.0


def test_nextqa_has_figures_for_causal_and_temporal_questions(tmp_path: Path) -> None:
    layouts.nextqa(tmp_path)
    samples = list(get_task("nextqa").samples(tmp_path))
    figures = get_task("nextqa").summarise(rows("nextqa", samples, ["B", "B"]))
    assert (figures["C"], figures["T"], figures["accuracy"]) == (1.0, 0.0, 0.5)


def test_wrong_answers_in_files_are_named(tmp_path: Path) -> None:
    layouts.egoschema(tmp_path)
    write(tmp_path / "subset_answers.json", {"v": 5})
    with pytest.raises(vtc.InputError, match=r"record 2: answer 5 is no number from 0 to 4"):
        get_task("egoschema").samples(tmp_path)
    layouts.mlvu(tmp_path)
    path = tmp_path / "json" / "4_count.json"
    path.write_text(path.read_text().replace('"answer": "He stands."', '"answer": "Nothing."'))
    with pytest.raises(vtc.InputError, match=r"4_count\.json, record 1: answer 'Nothing\.' is none of"):
        get_task("mlvu").samples(tmp_path)


# ---------------------------------------------------------------------------------------------------- one's own files


def test_pictures_come_as_paths_text_and_cells(tmp_path: Path) -> None:
    layouts.files(tmp_path)
    samples = get_task("files").samples(tmp_path)
    assert [len(sample.open_images()) for sample in samples] == [1, 1, 2]
    assert [sample.target for sample in samples] == [["cat"], ["1", "one"], ["yes"]]
    for name in ("questions.parquet", "arrow"):
        folder = tmp_path / f"{name}-folder"
        layouts.table(folder / name if "." in name else folder, [{"question": "?", "answer": "x"}] * 5)
        samples = get_task("files").samples(folder)
        assert [sample.open_images()[0].size for sample in samples] == [(8, 6)] * 5


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

        drawn = get_task("scenes", scenes=2).samples(None)
    else:
        from eval.tasks.clips.files import write_task as write_out

        drawn = get_task("clips", clips=2).samples(None)
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
    assert {sample.target for sample in samples} >= {"yes", "no", "circle", "teal"}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(vtc.InputError, match="pip install easy-vqa"):
        get_task("easy-vqa").samples(None)


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_the_table_that_the_tasks_make() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    assert with_table(page) == page, "run `python -m eval.tasks`"
    assert all(f"| `{name}` |" in page for name in names())
