"""Workers of a Ray cluster write the rows that one process writes. Slow to start: Ray is a few processes of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray", reason='Ray is not installed: pip install "vtc[ray]"')
pytest.importorskip("pandas")
pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")

import vtc
from eval import ray_backend, results_log, sweep
from eval.sweep import Job
from vtc import reference

pytestmark = [
    pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores"),
]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As Ray gives each of two workers on two cores; with more threads sums are rounded in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(out: Path) -> Job:
    return Job(
        task="scenes",
        data=None,
        model="reference",
        dtype="float32",
        device="cpu",
        attention=None,
        methods=("random",),
        keep=(0.1,),
        positions=("original",),
        options={},
        limit=6,
        frames=None,
        batch_size=2,
        seed=0,
        out=out,
    )


@pytest.mark.usefixtures("_one_thread")
def test_two_workers_give_the_rows_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setitem(ray_backend._LOCAL, "num_cpus", 2)
    whole, shared = job(tmp_path / "whole"), job(tmp_path / "ray")
    sweep.answer(whole, whole.load())
    rows = results_log.read(whole.out)[1]
    # An interrupted run: the first batch is there but for its last row, and only what is missing is asked.
    shared.out.mkdir()
    lines = (whole.out / "rows.jsonl").read_text().splitlines(keepends=True)
    (shared.out / "rows.jsonl").write_text("".join(lines[:12]))
    ray_backend.answer(shared, workers=2)
    headers, found = results_log.read(shared.out)
    assert found == rows
    assert (shared.out / "rows.jsonl").read_text().splitlines(keepends=True)[:12] == lines[:12]
    assert sum('"prediction"' in line for line in (shared.out / "rows.jsonl").read_text().splitlines()) == len(rows)
    assert headers[-1]["conditions"]["config"]["backend"] == "ray"
    assert headers[-1]["conditions"]["config"]["workers"] == 2
    assert headers[-1]["conditions"]["threads"] == 1
    assert headers[-1]["conditions"]["command"] == headers[0]["conditions"]["command"], "the driver's, not a worker's"


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(vtc.ConfigError, match="--workers must be at least 1"):
        ray_backend.answer(job(tmp_path), workers=0)
    with pytest.raises(vtc.ConfigError, match="no task is called"):
        ray_backend.answer(replace(job(tmp_path), task="nonsense"))
    assert not list(tmp_path.iterdir())
