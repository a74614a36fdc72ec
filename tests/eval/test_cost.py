"""What a run would cost at a true shape, read off a table of measured parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")

import pandas

import vtc
from eval import cost, plots, tables
from eval.__main__ import main
from eval.cost import CostTable
from eval.runs import BLIND, FULL, Run
from vtc import reference

MADE = {
    "name": "qwen2.5-vl-3b",
    "layers": 32,
    "tokens": [10, 100],
    "preprocessing": [0.1, 1.0],
    "tower": [1.0, 10.0],
    "decoder": [2.0, 20.0],
    "realised": 0.8,
    "selectors": {},
    "conditions": {
        "bench": {"machine": {"cpu": "made up", "threads": 1}, "text_tokens": 64, "dtype": "bfloat16"},
        "preprocessing": {},
    },
}


@pytest.fixture
def table(tmp_path: Path) -> CostTable:
    (tmp_path / "qwen2.5-vl-3b.json").write_text(json.dumps(MADE))
    return CostTable.load("qwen2.5-vl-3b", tmp_path)


def test_a_run_costs_its_parts(table: CostTable) -> None:
    assert table.seconds(FULL, 1.0, 12) == pytest.approx(31.0)
    assert table.seconds(Run("divprune", 0.5), 0.5, 12) == pytest.approx(1 + 10 + 10)
    assert table.seconds(Run("resize", 0.5), 0.5, 12) == pytest.approx(0.5 + 5 + 10)
    assert table.seconds(Run("random", 0.01), 0.01, 12) == pytest.approx(1 + 10 + 2), "not below what was measured"
    assert table.seconds(BLIND, 0.0, 12) is None
    assert table.seconds(Run("oracle", 0.5), 0.5, 12) is None
    # A quarter into the tower, so 24 of 32 layers see a half, at 80 % of what that could save.
    stages = Run.of_stages("divprune@vision:3=0.5+divprune@decoder=0.5")
    assert table.seconds(stages, 0.25, 12) == pytest.approx(1 + (8 * 10 + 24 * 5) / 32 / 0.8 + 5)
    assert table.seconds(stages, 0.25, None) is None, "at which depth is not known"
    assert table.seconds(Run.of_stages("uniform@pixels=0.5"), 0.5, None) is None
    assert table.seconds(Run.of_stages("uniform@decoder=0.5"), 0.5, None) == pytest.approx(21.0)


def test_selectors_cost_what_they_choose_among(tmp_path: Path) -> None:
    made = {**MADE, "selectors": {"divprune": [0.1, 0.2, 0.3, 0.4], "vtc": [0.5, 0.6, 0.7, 0.8]}}
    (tmp_path / "qwen2.5-vl-3b.json").write_text(json.dumps(made))
    table = CostTable.load("qwen2.5-vl-3b", tmp_path)
    assert table.seconds(FULL, 1.0, 12) == pytest.approx(31.0), "nothing is chosen"
    assert table.seconds(Run("divprune", 0.25), 0.25, 12) == pytest.approx(1 + 10 + 0.3 + 5)
    assert table.seconds(Run("divprune", keep_tokens=25), 0.25, 12) == pytest.approx(1 + 10 + 0.3 + 5)
    assert table.seconds(Run("vtc", 0.375), 0.375, 12) == pytest.approx(1 + 10 + 0.75 + 7.5)
    assert table.selector_seconds(Run("vtc", 0.375)) == pytest.approx(0.75)
    assert [table.selector_seconds(run) for run in (FULL, Run("fastv", 0.5), Run("oracle", 0.5))] == [None] * 3
    assert table.seconds(Run("fastv", 0.5), 0.6, 12) == pytest.approx(1 + 10 + 12)
    assert table.seconds(Run("tome", 0.5), 0.5, 12) is None, "what its layers see is its own affair"
    stages = Run.of_stages("divprune@vision:0=0.5+vtc@decoder=0.5")
    assert table.seconds(stages, 0.25, 12) == pytest.approx(1 + 5 / 0.8 + 0.4 + 0.5 * 0.8 + 5)


def test_a_picture_that_shrinks_by_whole_tokens_costs_what_came_out(table: CostTable) -> None:
    stages = Run.of_stages("resize@pixels=0.5+vtc@decoder=0.5")
    asked = table.seconds(stages, 0.25, 12)
    came_out = table.seconds(stages, 0.2, 12)
    assert asked == pytest.approx(0.5 + 5 + 5)
    assert came_out == pytest.approx(0.4 + 4 + 4)


def test_costs_stand_in_table_and_plot(table: CostTable, tmp_path: Path) -> None:
    runs = [FULL, BLIND, Run("uniform", 0.5)]
    frame = pandas.DataFrame(
        {
            "run": [run.name for run in runs],
            "method": ["all tokens", "blind", "uniform"],
            "positions": "original",
            "keep": [None, None, 0.5],
            "kept": [1.0, 0.0, 0.5],
            "score": [0.9, 0.2, 0.8],
            "low": [0.8, 0.1, 0.7],
            "high": [1.0, 0.3, 0.9],
            "ttft": [None, None, None],
            "n": 3,
        }
    )
    found = tables.with_cost(frame, runs, table, 12)
    assert found["call_speed_up"].tolist()[::2] == pytest.approx([1.0, 31 / 21])
    assert "| whole call at true shape, s | speed-up |" in tables.markdown(found)
    assert "| 21 | 1.48x |" in tables.markdown(found)
    assert {path.name for path in plots.against_cost(found, tmp_path, "x")} == {
        "score-by-tokens.png",
        "score-by-call.png",
    }
    assert "10 visual" not in table.described()
    assert "made up, 1 threads" in table.described()


def test_a_table_that_was_not_measured_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(vtc.ConfigError, match=r"none yet.*vtc bench tower --model qwen2.5-vl-3b"):
        CostTable.load("qwen2.5-vl-3b", tmp_path)
    (tmp_path / "qwen2.5-vl-3b.json").write_text('{"name": "x"}')
    with pytest.raises(vtc.ConfigError, match="not a table of costs"):
        CostTable.load("qwen2.5-vl-3b", tmp_path)
    assert main(["cost", "qwen2.5-vl-3b", "--bench", str(tmp_path / "nowhere")]) == 2
    assert "vtc bench tower" in capsys.readouterr().err


@pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")
def test_the_table_is_made_of_what_the_bench_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(setting: str, tokens: int, tower: float, realised: float) -> dict[str, Any]:
        parts = {"front": {"median": tower}, "decoder": 2 * tower, "realised_share": realised}
        return {"model": "qwen2.5-vl-3b", "setting": setting, "visual_tokens": tokens, **parts}

    results = [row("untouched", 64, 4.0, 1.0), row("untouched", 16, 1.0, 1.0)]
    results += [row(text, 64, 3.0, share) for text, share in zip(cost.SETTINGS, (0.9, 0.8), strict=True)]
    (tmp_path / "bench.json").write_text(json.dumps({"conditions": MADE["conditions"]["bench"], "results": results}))
    monkeypatch.setattr(cost, "TABLES", tmp_path)
    assert main(["cost", "qwen2.5-vl-3b", "--bench", str(tmp_path / "bench.json")]) == 0
    table = CostTable.load("qwen2.5-vl-3b", tmp_path)
    assert (table.tokens, table.tower, table.decoder, table.layers) == ((16, 64), (1.0, 4.0), (2.0, 8.0), 32)
    assert table.realised == pytest.approx(0.85)
    assert 0 < table.preprocessing[0] < 1
    with pytest.raises(vtc.ConfigError, match="no results"):
        cost.from_bench("qwen2.5-vl-3b", {"results": []}, None)


def test_selectors_are_added_to_the_table_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "TABLES", tmp_path)
    (tmp_path / "qwen2.5-vl-3b.json").write_text(json.dumps({**MADE, "tokens": [10, 576]}))
    files = []
    for share in cost.SHARES:
        each = {"method": "vtc", "tokens": 576, "width": 2048, "ours": {"median": share}}
        files.append(tmp_path / f"{share}.json")
        files[-1].write_text(json.dumps({"conditions": {"keep_ratio": share}, "results": [each]}))
    assert main(["cost", "qwen2.5-vl-3b", "--selectors", *map(str, files)]) == 0
    assert CostTable.load("qwen2.5-vl-3b", tmp_path).selectors == {"vtc": cost.SHARES}
    table = json.loads((tmp_path / "qwen2.5-vl-3b.json").read_text())
    assert table["conditions"]["bench"] == MADE["conditions"]["bench"]
    results = [json.loads(file.read_text()) for file in files]
    with pytest.raises(vtc.ConfigError, match=r"keep-ratio 0.5 "):
        cost.with_selectors(table, results[:-1])
    results[0]["results"][0]["width"] = 64
    with pytest.raises(vtc.ConfigError, match="same methods"):
        cost.with_selectors(table, results)
