"""Every writer of a final file leaves nothing, or what was there, when the disk is full or the process interrupted."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")
pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")

import numpy as np
import pandas as pd
from PIL import Image

import vtc
from eval import plots, readme, results_log
from eval.__main__ import main
from eval.results_log import ResultsLog
from eval.tasks.clips import files as clips
from eval.tasks.scenes import writer as scenes
from vtc import reference
from vtc.bench import _growth, timing
from vtc.report.visualize import save_animation

SCORES = pd.DataFrame({"colour": [0.5, 0.4]}, index=["all tokens", "random 0.5"])
TABLE = pd.DataFrame(
    {
        "run": ["all tokens", "random 0.5"],
        "method": [None, "random"],
        "positions": "original",
        "keep": [None, 0.5],
        "kept": [1.0, 0.5],
        "ttft": [1.0, 0.5],
        "score": [0.5, 0.4],
    }
)
PAGE = f"before\n{readme.BEGIN}\n{readme.END}\nafter\n"
CURVE = {"n": [256, 512], "seconds": [1.0, 2.0], "bytes": [1e6, 2e6]}


WRITERS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda path: vtc.CompressionConfig("random", keep_ratio=0.5).save(path),
    "bench.json": lambda path: timing.write_json(path, {"a": 1}),
    "growth.png": lambda path: _growth.plot({"x": {"ours": CURVE, "baseline": CURVE}}, path),
    "kept.gif": lambda path: save_animation([Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")], path),
    "score-by-tokens.png": lambda path: plots.against_cost(TABLE, path.parent, "title"),
    "score-by-kind.png": lambda path: plots.bars(SCORES, TABLE, path, "title"),
    "clip.mp4": lambda path: clips.write_mp4(path, np.zeros((2, 32, 32, 3), np.uint8)),
}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException, int], None]:
    return functools.partial(arm, monkeypatch)


def arm(patch: pytest.MonkeyPatch, error: BaseException, number: int) -> None:
    """Make the n-th flush of a file to the disk raise."""
    flushed = 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == number:
            raise error
        fsync(descriptor)

    patch.setattr(os, "fsync", full)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("before", [None, b"earlier"])
@pytest.mark.parametrize("name", WRITERS)
def test_half_a_file_is_no_file(
    name: str, before: bytes | None, error: BaseException, tmp_path: Path, failing: Callable[[BaseException, int], None]
) -> None:
    path = tmp_path / name
    if before is not None:
        path.write_bytes(before)
    known = sorted(tmp_path.iterdir())
    failing(error, 1)
    with pytest.raises(type(error)) as caught:
        WRITERS[name](path)
    if isinstance(error, OSError):
        assert caught.value.filename == str(path)
    assert sorted(tmp_path.iterdir()) == known
    assert before is None or path.read_bytes() == before
    WRITERS[name](path)  # the disk has room again
    assert path.stat().st_size > 0
    assert not list(tmp_path.glob(".vtc*"))


def test_the_page_stays_as_it_was(tmp_path: Path, failing: Callable[[BaseException, int], None]) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    failing(KeyboardInterrupt(), 1)
    with pytest.raises(KeyboardInterrupt):
        readme.write(page)
    assert page.read_text() == PAGE
    readme.write(page)
    assert readme.current(page) == readme.block()


@pytest.mark.parametrize("write", [scenes.write, clips.write_task], ids=["scenes", "clips"])
def test_questions_come_when_all_pictures_are_there(
    write: Callable[..., int], tmp_path: Path, failing: Callable[[BaseException, int], None]
) -> None:
    failing(KeyboardInterrupt(), 2)  # the second picture
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "test", 2)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1, "the first picture"
    assert write(tmp_path, "test", 2) == len((tmp_path / "questions.jsonl").read_text().splitlines())


@pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")
def test_a_sweep_that_is_interrupted_anywhere_gives_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", "--limit", "2", "--methods", "uniform", "--keep", "0.25", "--batch-size", "2", "--timed", "0"]
    whole = tmp_path / "whole"
    assert main([*command, "--out", str(whole)]) == 0
    for number in (1, 2, 7, 14, 15, 17):
        ended = tmp_path / f"ended at {number}"
        with pytest.MonkeyPatch.context() as armed:
            arm(armed, KeyboardInterrupt(), number)
            assert main([*command, "--out", str(ended)]) == 130, number
        assert capsys.readouterr().err.splitlines()[-1] == "eval: interrupted"
        assert main([*command, "--out", str(ended)]) == 0
        assert results_log.read(ended)[1] == results_log.read(whole)[1], number
        assert {path.name for path in ended.iterdir()} == {path.name for path in whole.iterdir()}, number
        assert (ended / "table.csv").read_text() == (whole / "table.csv").read_text(), number


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\n", "line 1: not JSON"),
        (b"\xff\n", "line 1: not JSON"),
        (b"[" * 100_000 + b"\n", "line 1: not JSON"),
        (b"3\n", "line 1: neither a header nor a row"),
        (b"{}\n", "line 1: neither a header nor a row"),
        (b"", "are empty"),
        (b'{"identity": {', "are empty"),
    ],
    ids=range(7),
)
def test_a_file_that_is_no_log_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(vtc.InputError, match=message):
        results_log.read(tmp_path)
    if message != "are empty":
        with pytest.raises(vtc.InputError, match=message):
            ResultsLog(tmp_path / "rows.jsonl", {}, {})
        assert (tmp_path / "rows.jsonl").read_bytes() == content


def test_a_log_on_a_full_disk_is_cut_to_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with ResultsLog(path, {"a": 1}, {}) as log:
        log.add({"run": "x", "sample": "1"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"run": "x", "samp')
    with ResultsLog(path, {"a": 1}, {}) as log:
        assert [row["sample"] for row in log.rows] == ["1"]
    assert path.read_bytes().startswith(whole + b'{"identity"')


@pytest.mark.parametrize("keep", ["nan", "inf", "0", "-1", "2.5", "1e300"])
def test_budgets_are_fractions_or_counts(keep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"--keep={keep}", "--out", str(tmp_path / "out")]) == 2
    assert "eval: error: --keep takes fractions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/out"])
def test_output_folders_are_checked_before_a_model_is_loaded(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["run", "--model", "nowhere", "--limit", "1", "--methods", "random", "--out", place]) == 2
    error = capsys.readouterr().err
    assert place in error
    assert error.startswith("eval: error: ")
    assert error.count("\n") == 1
