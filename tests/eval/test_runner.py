"""The runner: every sample in every cell once, whatever happens to the process or to a picture."""

from __future__ import annotations

import json
import os
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
from eval import journal, models, runner, tables
from eval.__main__ import main
from eval.cells import FULL, Cell, sweep_cells
from eval.journal import Journal
from eval.tasks import Sample, Task, get_task
from vtc import reference

pytestmark = pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")

ROOT = Path(__file__).parents[2]
RUN = {"task": "scenes", "seed": 0}


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.load("reference")


@pytest.fixture(scope="module")
def samples() -> Sequence[Sample]:
    return get_task("scenes", scenes=3, per_scene=2).samples(None)


def measure(
    loaded: models.Loaded, samples: Sequence[Sample], cells: list[Cell], path: Path, **more: Any
) -> list[dict[str, Any]]:
    with Journal(path, RUN, {}) as rows:
        runner.run(loaded, get_task("scenes"), samples, cells, rows, progress=False, **more)
    return journal.read(path)[1]


CELLS = [FULL, Cell("random", 0.25), Cell("fastv", 0.5), Cell("oracle", 0.1)]


def test_rows_say_what_was_kept_and_how_far_answers_moved(
    loaded: models.Loaded, samples: Sequence[Sample], tmp_path: Path
) -> None:
    rows = measure(loaded, samples, CELLS, tmp_path / "rows.jsonl", batch_size=4)
    assert [(row["cell"], row["sample"]) for row in rows] == [
        (cell.name, sample.id) for sample in samples for cell in CELLS
    ]
    cells = runner.in_groups(rows)
    assert all(row["agrees"] and row["kl"] == 0.0 and row["kept"] == 1.0 for row in cells["all tokens"])
    assert all(row["kept"] == 0.25 for row in cells["random 0.25"])
    # Half of the tokens in four of the six layers.
    assert all(row["kept"] == pytest.approx((2 + 4 * 0.5) / 6) for row in cells["fastv 0.5"])
    assert all(row["kept"] == 26 / 256 for row in cells["oracle 0.1"])
    assert all(row["kl"] > 0 for row in cells["random 0.25"])
    assert all(0.2 < row["flops_share"] < 0.3 for row in cells["random 0.25"])
    assert not vtc.is_compressed(loaded.model)


def test_batches_and_shards_do_not_change_rows(
    loaded: models.Loaded, samples: Sequence[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [FULL, Cell("random", 0.25), Cell("divprune", 0.25)]

    def essence(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(r["cell"], r["sample"], r["prediction"], r["scores"], r["kept"], round(r["kl"], 4)) for r in rows]

    whole = essence(measure(loaded, samples, cells, tmp_path / "whole" / "rows.jsonl", batch_size=3))
    single = essence(measure(loaded, samples, cells, tmp_path / "single" / "rows.jsonl", batch_size=1))
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        measure(loaded, samples, cells, tmp_path / "shards" / f"rows.{rank}-of-2.jsonl", batch_size=2)
    shards = essence(journal.read(tmp_path / "shards")[1])
    assert whole == single == shards


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eval", "run", "--task", "scenes", "--limit", "6", "--methods", "uniform"]
    command += ["--keep", "0.25", "--batch-size", "1", "--out", str(tmp_path)]
    rows = tmp_path / "rows.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.time() + 120
        while (not rows.exists() or rows.read_text().count("\n") < 5) and process.poll() is None:
            assert time.time() < deadline, "no rows in two minutes"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    before = rows.read_text().splitlines()
    assert len(before) >= 5
    with rows.open("a") as file:
        file.write('{"cell": "uniform 0.25", "sam')  # what a kill in the middle of a line leaves
    assert main(command[3:]) == 0
    after = rows.read_text().splitlines()
    assert after[: len(before)] == before
    _, every = journal.read(tmp_path)
    # Oracle and anti-oracle, random and uniform, all tokens and blind; none twice.
    assert len(every) == 6 * 6
    assert len({(row["cell"], row["sample"]) for row in every}) == 36


def test_rows_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Journal(path, {"task": "scenes", "seed": 0}, {}).close()
    with pytest.raises(vtc.InputError, match=r"another run \(different: seed"):
        Journal(path, {"task": "scenes", "seed": 1}, {})
    Journal(tmp_path / "rows.2.jsonl", {"task": "pope", "seed": 0}, {}).close()
    with pytest.raises(vtc.InputError, match="different runs"):
        journal.read(tmp_path)
    with pytest.raises(vtc.InputError, match="no rows"):
        journal.read(tmp_path / "nowhere")


def test_a_line_changed_by_hand_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Journal(path, RUN, {}).close()
    path.write_text(path.read_text() + "{oops}\n")
    with pytest.raises(vtc.InputError, match="line 2"):
        journal.read(path)


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
    cells = [FULL, Cell("divprune", 0.25)]
    task = Files()
    with Journal(tmp_path / "rows.jsonl", RUN, {}) as rows:
        runner.run(loaded, task, task.samples(pictures), cells, rows, batch_size=4, progress=False)
    frame = tables.summary(rows.rows, cells, task)
    assert frame["broken"].tolist() == [2, 2]
    assert frame["n"].tolist() == [2, 2]
    assert frame["score"].tolist() == [1.0, 1.0]
    assert "| broken |" in tables.markdown(frame)
    errors = {row["sample"]: row["error"] for row in rows.rows if "error" in row}
    assert "a.png: not a picture" in errors["a"]
    assert "c.png" in errors["c"]
    nothing = [row for row in rows.rows if "error" in row]
    with pytest.raises(vtc.InputError, match="none of 2 samples could be read"):
        tables.summary(nothing, cells, task)


def test_sweep_writes_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", "--task", "scenes", "--limit", "12", "--methods", "divprune", "--keep", "0.1"]
    arguments += ["--timed", "1", "--rounds", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    written = {path.name for path in tmp_path.iterdir()}
    pictures = {"score-by-tokens.png", "score-by-ttft.png", "score-by-kind.png"}
    assert written == {"rows.jsonl", "table.md", "table.csv", *pictures}
    text = (tmp_path / "table.md").read_text()
    for name in ("all tokens", "blind", "random", "uniform", "divprune", "oracle", "anti-oracle"):
        assert f"| {name} |" in text
    assert "- weights: " in text
    assert "TTFT speed-up" in text
    capsys.readouterr()
    assert main(["compare", str(tmp_path), "anti-oracle 0.1", "oracle 0.1"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("oracle 0.1 - anti-oracle 0.1: +")
    assert "McNemar" in told
    assert main(["compare", str(tmp_path), "oracle 0.1", "nonsense"]) == 2
    assert "it has: all tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nonsense"], "no task is called 'nonsense'"),
        (["--task", "scenes", "--methods", "nonsense"], "unknown method"),
        (["--task", "scenes", "--keep", "-1"], "keep_ratio"),
        (["--task", "scenes", "--limit", "0"], "--limit"),
        (["--task", "scenes", "--option", "fastv=3"], "METHOD.NAME=VALUE"),
        (["--task", "scenes", "--frames", "8"], "scenes shows no video files"),
        (["--task", "clips", "--limit", "1"], "LlavaProcessor takes no videos"),
        (["--task", "scenes", "--model", "nowhere", "--limit", "1"], "no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cells_bring_the_baselines_along() -> None:
    cells = sweep_cells(["fastv"], [0.5, 32], options={"fastv": {"layer": 3}})
    assert [cell.name for cell in cells] == [
        "all tokens",
        "blind",
        "random 0.5",
        "random 32 tokens",
        "uniform 0.5",
        "uniform 32 tokens",
        "fastv 0.5 layer=3",
        "fastv 32 tokens layer=3",
    ]


def test_the_front_is_what_nothing_beats() -> None:
    assert tables.pareto([1, 2, 3, 4, 2], [0.5, 0.7, 0.6, 0.9, 0.65]) == [0, 1, 3]


def test_a_row_is_one_line(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl", RUN, {}) as rows:
        rows.add({"cell": "a", "sample": "1", "order": 0, "cell_order": 0, "prediction": "two\nlines \u2028"})
        assert rows.has("a", "1")
    lines = (tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 3
    assert json.loads(lines[1])["prediction"] == "two\nlines \u2028"
