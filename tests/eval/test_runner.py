"""The runner: every sample is measured once in every run, even if the process is killed or an image is broken."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("pandas")
pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")

import vtc
from eval import models, results_log, runner, tables
from eval.__main__ import main
from eval.answerer import Answerer
from eval.results_log import ResultsLog
from eval.runs import FULL, Run
from eval.tasks import Sample, Task, get_task
from vtc import reference

pytestmark = pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")

ROOT = Path(__file__).parents[2]
IDENTITY = {"task": "scenes", "seed": 0}


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.load("reference")


@pytest.fixture(scope="module")
def samples() -> Sequence[Sample]:
    return get_task("scenes", pictures=3, per_picture=2).samples(None)


def measure(
    loaded: models.Loaded, samples: Sequence[Sample], runs: list[Run], path: Path, **more: Any
) -> list[dict[str, Any]]:
    with ResultsLog(path, IDENTITY, {}) as rows:
        runner.answer_samples(loaded, get_task("scenes"), samples, runs, rows, progress=False, **more)
    return results_log.read(path.parent)[1]


RUNS = [FULL, Run("random", 0.25), Run("fastv", 0.5), Run("oracle", 0.1)]


def test_rows_say_what_was_kept_and_how_far_answers_moved(
    loaded: models.Loaded, samples: Sequence[Sample], tmp_path: Path
) -> None:
    rows = measure(loaded, samples, RUNS, tmp_path / "rows.jsonl", batch_size=4)
    assert [(row["run"], row["sample"]) for row in rows] == [
        (run.name, sample.id) for sample in samples for run in RUNS
    ]
    runs = runner.rows_by_run(rows)
    assert all(row["agrees"] and row["kl"] == 0.0 and row["kept"] == 1.0 for row in runs["all tokens"])
    assert all(row["kept"] == 0.25 for row in runs["random 0.25"])
    # Half of the tokens in four of the six layers.
    assert all(row["kept"] == pytest.approx((2 + 4 * 0.5) / 6) for row in runs["fastv 0.5"])
    assert all(row["kept"] == 26 / 256 for row in runs["oracle 0.1"])
    assert all(row["kl"] > 0 for row in runs["random 0.25"])
    assert all(0.2 < row["flops_share"] < 0.3 for row in runs["random 0.25"])
    whole = {row["sample"]: row["flops"] for row in runs["all tokens"]}
    assert all(row["flops"] == pytest.approx(row["flops_share"] * whole[row["sample"]]) for row in rows)
    assert all(row["visual"] == 256 for row in rows if row["run"] != "all tokens")
    assert not vtc.is_compressed(loaded.model)


def test_batches_do_not_change_answers(loaded: models.Loaded, samples: Sequence[Sample], tmp_path: Path) -> None:
    runs = [FULL, Run("random", 0.25), Run("divprune", 0.25)]

    def essence(batch_size: int) -> list[tuple[Any, ...]]:
        rows = measure(loaded, samples, runs, tmp_path / str(batch_size) / "rows.jsonl", batch_size=batch_size)
        names = ("run", "sample", "prediction", "scores", "visual", "kept", "flops", "flops_share")
        return [(*(row[name] for name in names), round(row["kl"], 4)) for row in rows]

    assert essence(3) == essence(1)


def test_shards_give_the_same_rows(
    loaded: models.Loaded, samples: Sequence[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(loaded, samples, RUNS, tmp_path / "whole" / "rows.jsonl", batch_size=2)
    folder = tmp_path / "shards"
    sizes = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        measure(loaded, samples, RUNS, folder / f"rows.{rank}-of-2.jsonl", batch_size=2)
        sizes.append(len((folder / f"rows.{rank}-of-2.jsonl").read_text().splitlines()) - 1)
    assert sizes == [16, 8], "three batches of two samples in four runs"
    assert results_log.read(folder)[1] == whole
    # Whoever comes later, in whatever number, finds the work done.
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert measure(loaded, samples, RUNS, folder / "rows.jsonl", batch_size=2) == whole
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 1


def test_a_later_session_adds_other_runs(loaded: models.Loaded, samples: Sequence[Sample], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    measure(loaded, samples[:2], [FULL, Run("random", 0.25), Run("uniform", 0.25)], path)
    rows = measure(loaded, samples, [FULL, Run("uniform", 0.25), Run("divprune", 0.25)], path)
    sizes = {name: len(each) for name, each in runner.rows_by_run(rows).items()}
    assert sizes == {"all tokens": 6, "uniform 0.25": 6, "random 0.25": 2, "divprune 0.25": 6}


ENDED = ("run", "--limit", "6", "--methods", "uniform", "--keep", "0.25", "--batch-size", "2", "--out")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    assert main([*ENDED, str(folder)]) == 0
    return results_log.read(folder)[1]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_an_ended_process_gives_the_rows_of_an_uninterrupted_one(
    tmp_path: Path, sent: int, status: int, uninterrupted: list[dict[str, Any]]
) -> None:
    killed = tmp_path / "killed"
    rows = killed / "rows.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "eval", *ENDED, str(killed)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        deadline = time.time() + 500  # ten seconds, unless the machine is very busy
        # Ten rows are the middle of the first batch: seven runs of two samples each.
        while (not rows.exists() or rows.read_text().count("\n") < 11) and process.poll() is None:
            if time.time() > deadline:
                break
            time.sleep(0.01)
        ended = process.poll() is not None
        process.send_signal(sent)  # SIGKILL: nothing in the process can prepare for it
        assert process.stderr is not None
        said = process.stderr.read().decode().replace("\r", "\n").splitlines()
    assert process.returncode == status
    assert status < 0 or said[-1] == "eval: interrupted"
    assert not any("Traceback" in line for line in said)
    assert not ended, "it ended before it could be killed"
    assert time.time() < deadline, "too busy a machine: not ten rows in 500 seconds"
    before = rows.read_text().splitlines()
    assert 11 <= len(before) < 1 + 42
    with rows.open("a") as file:
        file.write('{"run": "uniform 0.25", "sam')  # what a kill in the middle of a line leaves
    assert main([*ENDED, str(killed)]) == 0
    assert rows.read_text().splitlines()[: len(before)] == before, "what was measured is not measured again"
    assert rows.read_text().count('"prediction"') == 42, "nothing twice"
    assert results_log.read(killed)[1] == uninterrupted


def test_rows_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ResultsLog(path, {"task": "scenes", "seed": 0}, {}).close()
    with pytest.raises(vtc.InputError, match=r"another evaluation \(different: seed"):
        ResultsLog(path, {"task": "scenes", "seed": 1}, {})
    with pytest.raises(vtc.InputError, match=r"rows.jsonl holds rows of another evaluation \(different: task"):
        ResultsLog(tmp_path / "rows.1-of-2.jsonl", {"task": "pope", "seed": 0}, {})
    ResultsLog(tmp_path / "other" / "rows.jsonl", {"task": "pope", "seed": 0}, {}).close()
    (tmp_path / "other" / "rows.jsonl").rename(tmp_path / "rows.2.jsonl")
    with pytest.raises(vtc.InputError, match="different evaluations"):
        results_log.read(tmp_path)
    with pytest.raises(vtc.InputError, match="no rows"):
        results_log.read(tmp_path / "nowhere")


def test_logs_with_the_former_names_of_fields_are_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"run": IDENTITY, "conditions": {"cells": [{"name": "b"}, {"name": "a"}], "command": "x"}},
        {"cell": "a", "sample": "1", "order": 0, "kl": 0.5},
        {"cell": "b", "sample": "1", "order": 0, "error": "broken"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with ResultsLog(path, IDENTITY, {"runs": []}, retry=True) as log:
        assert log.has("a", "1")
        assert not log.has("b", "1")
        log.add({"run": "b", "sample": "1", "order": 0, "kl": 0.25})
    headers, rows = results_log.read(tmp_path)
    assert [header["identity"] for header in headers] == [IDENTITY] * 2
    assert headers[0]["conditions"] == {"command": "x", "runs": [{"name": "b"}, {"name": "a"}]}
    assert [(row["run"], row["kl"]) for row in rows] == [("b", 0.25), ("a", 0.5)]
    with pytest.raises(vtc.InputError, match=r"different: seed"):
        ResultsLog(path, IDENTITY | {"seed": 1}, {})


def test_a_line_changed_by_hand_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ResultsLog(path, IDENTITY, {}).close()
    path.write_text(path.read_text() + "{oops}\n")
    with pytest.raises(vtc.InputError, match="line 2"):
        results_log.read(path)


@dataclass(frozen=True)
class Files(Task):
    name: ClassVar[str] = "files"
    licence: ClassVar[str] = "none"
    source: ClassVar[str] = "the test"
    layout: ClassVar[str] = "pictures"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        assert folder is not None
        return [Sample(path.stem, "What is left of the cup?", (path,)) for path in sorted(folder.iterdir())]

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"score": float(prediction == "yellow star")}


def test_broken_pictures_are_rows_and_are_counted(loaded: models.Loaded, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    good = reference.samples()[6].read_bytes()
    for name, content in (("a", b""), ("b", good), ("c", good[: len(good) // 2]), ("d", good)):
        (pictures / f"{name}.png").write_bytes(content)
    runs = [FULL, Run("divprune", 0.25)]
    task = Files()
    with ResultsLog(tmp_path / "rows.jsonl", IDENTITY, {}) as rows:
        runner.answer_samples(loaded, task, task.samples(pictures), runs, rows, batch_size=4, progress=False)
    frame = tables.summary(rows.rows, runs, task)
    assert frame["broken"].tolist() == [2, 2]
    assert frame["n"].tolist() == [2, 2]
    assert frame["score"].tolist() == [1.0, 1.0]
    assert "| broken |" in tables.markdown(frame)
    errors = {row["sample"]: row["error"] for row in rows.rows if "error" in row}
    assert "a.png: the file is empty" in errors["a"]
    assert "c.png" in errors["c"]
    nothing = [row for row in rows.rows if "error" in row]
    with pytest.raises(vtc.InputError, match="none of 2 samples could be answered; the first: sample a"):
        tables.summary(nothing, runs, task)
    assert set(tables.unanswered([row for row in rows.rows if row["run"] == FULL.name], runs)) == {"divprune 0.25"}


def test_what_broke_is_tried_again_if_asked(loaded: models.Loaded, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"")
    task, path = Files(), tmp_path / "rows.jsonl"
    for content, retry, errors in ((b"", False, 1), (None, False, 1), (None, True, 0)):
        (pictures / "a.png").write_bytes(reference.samples()[6].read_bytes() if content is None else content)
        with ResultsLog(path, IDENTITY, {}, retry=retry) as rows:
            runner.answer_samples(loaded, task, task.samples(pictures), [FULL], rows, progress=False)
        found = results_log.read(path)[1]
        assert len(found) == 1
        assert sum("error" in row for row in found) == errors


def test_a_failure_of_the_model_is_in_the_row_of_its_sample(
    loaded: models.Loaded, samples: Sequence[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, bad = models.inputs, samples[3]

    def inputs(loaded: models.Loaded, batch: Sequence[Sample], media: Any) -> Any:
        if bad in batch and (vtc.is_compressed(loaded.model) or everywhere):
            raise RuntimeError("out of memory, say")
        return genuine(loaded, batch, media)

    monkeypatch.setattr(models, "inputs", inputs)
    runs = [FULL, Run("uniform", 0.25)]
    everywhere = True
    rows = measure(loaded, samples, runs, tmp_path / "all" / "rows.jsonl", batch_size=3)
    broken = {(row["run"], row["sample"]): row["error"] for row in rows if "error" in row}
    assert set(broken) == {(run.name, bad.id) for run in runs}
    assert set(broken.values()) == {"all tokens: RuntimeError: out of memory, say"}
    assert len(rows) == 12
    # Nothing works from the start: that is no sample's fault.
    with pytest.raises(RuntimeError, match="say"):
        measure(loaded, [bad], runs, tmp_path / "none" / "rows.jsonl")


def test_only_the_run_that_fails_is_broken(
    loaded: models.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, plan = models.answer, Answerer._plan
    samples = get_task("scenes", pictures=1, per_picture=3).samples(None)
    asked: list[int] = []
    planned: list[Run] = []

    def noted(self: Answerer, run: Run, sample: Sample) -> Any:
        planned.append(run)
        return plan(self, run, sample)

    def answer(loaded: models.Loaded, encoded: Any, length: int) -> Any:
        if planned[-1] != FULL:
            asked.append(len(encoded["input_ids"]))
            if len(asked) in (1, 3):  # the batch, then its second sample alone
                raise IndexError("a bug of this method")
        return genuine(loaded, encoded, length)

    monkeypatch.setattr(models, "answer", answer)
    monkeypatch.setattr(Answerer, "_plan", noted)
    rows = measure(loaded, samples, [FULL, Run("uniform", 0.25)], tmp_path / "rows.jsonl")
    assert asked == [3, 1, 1, 1]
    assert [(row["run"], row["sample"], row["error"]) for row in rows if "error" in row] == [
        ("uniform 0.25", samples[1].id, "IndexError: a bug of this method")
    ]


def test_a_row_is_one_line(tmp_path: Path) -> None:
    with ResultsLog(tmp_path / "rows.jsonl", IDENTITY, {}) as rows:
        rows.add({"run": "a", "sample": "1", "order": 0, "prediction": "two\nlines \u2028"})
        assert rows.has("a", "1")
    lines = (tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 3
    assert json.loads(lines[1])["prediction"] == "two\nlines \u2028"
