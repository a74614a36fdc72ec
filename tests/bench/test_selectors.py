"""`vtc bench selectors`: methods choose what their transcriptions choose, and everything but the times."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import vtc
from vtc.bench import _selectors
from vtc.bench._ops import Draw
from vtc.bench._selectors import VIDEO, draw_context, methods
from vtc.bench._transcriptions import TRANSCRIPTIONS
from vtc.cli import main


def small_context(method: str, seed: int, keep_ratio: float = 0.2) -> tuple[Any, Any]:
    grids = ((20, 4, 6),) if method in VIDEO else ((1, 12, 10), (1, 8, 12))
    n = 480 if method in VIDEO else 216
    draw = Draw(torch.Generator().manual_seed(seed))
    return draw_context(method, n, 24, keep_ratio, draw, grids)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", TRANSCRIPTIONS)
def test_methods_choose_what_their_equations_say(method: str, seed: int) -> None:
    selector, ctx = small_context(method, seed, 0.4 if method in ("evs", "dycoke") else 0.2)
    keep, merged = TRANSCRIPTIONS[method](selector, ctx)
    selection = selector.select(ctx)
    assert torch.equal(selection.keep, keep)
    assert (selection.assign is None) == (merged is None)
    if merged is not None:
        torch.testing.assert_close(selection.merge(ctx.features), merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep_ratio", [0.056, 0.25, 0.5])
def test_vtc_chooses_what_its_equations_say_of_videos(keep_ratio: float) -> None:
    draw = Draw(torch.Generator().manual_seed(0))
    selector, ctx = draw_context("vtc", 480, 24, keep_ratio, draw, ((20, 4, 6),))
    ctx.modality = "video"
    keep, merged = TRANSCRIPTIONS["vtc"](selector, ctx)
    selection = selector.select(ctx)
    assert torch.equal(selection.keep, keep)
    torch.testing.assert_close(selection.merge(ctx.features), merged, rtol=1e-4, atol=1e-4)


def test_methods_before_the_decoder() -> None:
    found = methods(None)
    assert set(TRANSCRIPTIONS) <= set(found)
    assert {"random", "uniform", "pool", "aim", "vscan"} <= set(found)
    assert not {"fastv", "tome", "pixelprune", "flowcut", "adaptive-sparse-vit", "atp"} & set(found)
    with pytest.raises(vtc.ConfigError, match="--method fastv"):
        methods(["fastv"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selectors, "GRIDS", {576: ((1, 6, 6),), 2880: ((1, 8, 8),), 12544: ((1, 10, 10),)})
    monkeypatch.setattr(_selectors, "VIDEOS", {576: ((4, 3, 3),), 2880: ((4, 4, 4),), 12544: ((4, 5, 5),)})
    sizes = {36: 576, 64: 2880, 100: 12544}
    drawn = _selectors.draw_context

    def smaller(method: str, tokens: int, width: int, *others: Any) -> Any:
        n = {wide: narrow for narrow, wide in sizes.items()}[tokens]
        grids = (_selectors.VIDEOS if method in VIDEO else _selectors.GRIDS)[tokens]
        return drawn(method, n, 16, *others, grids)

    monkeypatch.setattr(_selectors, "draw_context", smaller)
    monkeypatch.setattr(_selectors, "saved_seconds", lambda args: 0.01)


@pytest.mark.usefixtures("small")
def test_the_table_of_all_methods(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "selectors.json"
    options = ["--repeats", "1", "--warmup", "0", "--keep-ratio", "0.5", "--json", str(written)]
    assert main(["bench", "selectors", "--width", "3584", "--tokens", "576", "--tokens", "2880", *options]) == 0
    shown = capsys.readouterr().out
    found = json.loads(written.read_text())
    assert {r["method"] for r in found["results"]} == set(methods(None))
    for r in found["results"]:
        assert (r["not_run"] == "none") == (r["method"] not in TRANSCRIPTIONS)
        assert ("plain" in r) == (r["not_run"] is None)
        assert f"| {r['method']} " in shown
        assert r.get("agreement", "equal") == "equal", r["method"]
        assert r["ours_bytes"] >= 0
    assert "of the 10 ms that they save of a 7B prefill" in shown


@pytest.mark.usefixtures("small")
def test_what_would_take_too_long_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--repeats", "1", "--warmup", "0", "--width", "1024", "--most-seconds", "1e-9"]
    assert main(["bench", "selectors", "--method", "divprune", "--tokens", "576", "--tokens", "2880", *options]) == 0
    shown = capsys.readouterr().out
    assert "up to" in shown
    assert shown.count("equal") == 1


def test_summary_names_the_slow_and_the_dear() -> None:
    timing = {"median": 0.5, "quartiles": [0.5, 0.5], "seconds": [0.5]}
    rows = [
        {"method": "slow", "tokens": 2880, "width": 3584, "ours": timing, "speed_up": 0.5},
        {"method": "fast", "tokens": 576, "width": 3584, "ours": timing, "speed_up": 2.0},
    ]
    text = _selectors.summary(rows, 20.0)
    assert "slow (2880, 3584: 0.50x)" in text
    assert "bfloat16): slow." in text
    assert "none" in _selectors.summary(rows[1:], 20.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--width", "4"], "--width must be from 8"),
        (["--method", "fastv"], "--method fastv"),
        (["--clock", "cpu", "--device", "cuda"], "--clock cpu"),
        (["--keep-ratio", "0"], "keep_ratio"),
    ],
)
def test_refuses(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "selectors", *options]) != 0
    assert said in capsys.readouterr().err
