"""Layer budgets fitted to samples: a profile that a file brings back, and that keeps what was asked for."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests import tiny
from vtc.tuning.layers import fit_layer_budgets


@pytest.fixture(scope="module")
def case() -> tiny.TinyCase:
    return tiny.build("llava")


@pytest.fixture(scope="module")
def rows(case: tiny.TinyCase) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    single = case.batch("single")
    return [{**single, "pixel_values": torch.randn_like(single["pixel_values"])} for _ in range(3)]


def counts(case: tiny.TinyCase, config: vtc.CompressionConfig, prompt: dict[str, Any]) -> list[int]:
    with vtc.compressed(case.model, config) as model:
        model(**prompt)
        report = vtc.report(model)
    text = report.lengths_before[0] - report.visual_tokens_before
    return [stored - text * (report.scope == "visual") for (stored,) in report.stored_per_layer]


@pytest.mark.parametrize("scope", ["visual", "all"])
@pytest.mark.parametrize("method", ["prefixkv", "snapkv"])
@torch.no_grad()
def test_a_profile_is_the_mean_over_samples_and_survives_its_file(
    case: tiny.TinyCase, rows: list[dict[str, Any]], tmp_path: Path, method: str, scope: str
) -> None:
    options = {"scope": scope, "budgets": "cumulative"}
    config = vtc.calibrate(case.model, None, rows, method=method, keep_ratio=0.4, **options)
    fractions = config.options["budgets"]
    assert len(fractions) == 4
    assert statistics.fmean(fractions) == pytest.approx(0.4, abs=2e-4)

    entries = 16 if scope == "visual" else rows[0]["input_ids"].shape[1]
    policy = vtc.CompressionConfig(method, keep_ratio=0.4, options=options)
    kept = [counts(case, policy, row) for row in rows]
    dropped = [1 - statistics.fmean(layer) / entries for layer in zip(*kept, strict=True)]
    scale = 0.6 / statistics.fmean(dropped)
    assert fractions == pytest.approx([1 - share * scale for share in dropped], abs=1e-4)
    assert len(set(fractions)) > 1, "layers differ"

    path = tmp_path / "profile.json"
    config.save(path)
    assert vtc.CompressionConfig.load(path) == config
    assert json.loads(path.read_text())["options"]["budgets"] == list(fractions)
    expected = [entries - round((1 - share) * entries) for share in fractions]
    assert counts(case, vtc.CompressionConfig.load(path), rows[0]) == expected
    assert not vtc.is_compressed(case.model)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "divprune"}, "divprune has no layer budgets to fit"),
        ({"budgets": [0.5] * 4}, "budgets are fixed fractions"),
        ({"keep_ratio": 2}, "keep_ratio"),
        ({"start": -1}, "start must be an integer of at least 0"),
    ],
    ids=str,
)
def test_mistakes_are_named(
    case: tiny.TinyCase, rows: list[dict[str, Any]], arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(vtc.ConfigError, match=match):
        fit_layer_budgets(case.model, None, rows, **{"keep_ratio": 0.5, **arguments})


def test_what_belongs_to_a_search_is_refused(case: tiny.TinyCase, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(vtc.ConfigError, match="plot: prefixkv fits its layer budgets without a search"):
        vtc.calibrate(case.model, None, rows, method="prefixkv", keep_ratio=0.5, plot=tmp_path / "plot.png")
