"""Layer budgets that evolve: the search finds minima, budgets stay what was asked for, and answers get no worse."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

import vtc
from tests import tiny
from tests.invariants.matrix import sharp
from vtc.tuning.cma import CmaEs
from vtc.tuning.evolve import _Judge, with_mean


def test_the_search_finds_the_minimum_of_a_narrow_valley() -> None:
    target = torch.tensor([0.3, -0.2, 0.7, 0.1], dtype=torch.float64)
    stretch = torch.tensor([1.0, 30.0, 3.0, 10.0], dtype=torch.float64)
    search = CmaEs([0.0] * 4, 0.5, seed=1)
    for _ in range(120):
        candidates = search.ask()
        assert candidates.shape == (search.population, 4)
        search.tell(candidates, [float(((row - target) * stretch).pow(2).sum()) for row in candidates])
    assert torch.allclose(search.mean, target, atol=1e-4)
    assert search.spread < 1e-2


def test_one_number_is_searched_too_and_seeds_decide() -> None:
    ends = []
    for seed in (0, 0, 1):
        search = CmaEs([0.0], 0.3, seed=seed)
        for _ in range(60):
            candidates = search.ask()
            search.tell(candidates, [abs(float(row) - 0.8) for row in candidates[:, 0]])
        ends.append(float(search.mean))
    assert ends[0] == ends[1] != ends[2]
    assert ends == pytest.approx([0.8] * 3, abs=1e-3)


@pytest.mark.parametrize(
    ("before", "changed", "mean", "expected"),
    [
        ([0.5, 0.5, 0.5, 0.5], {0: 0.8}, 0.5, [0.8, 0.4, 0.4, 0.4]),
        ([0.5, 0.5, 0.5, 0.5], {0: 0.9, 1: 0.9}, 0.5, [0.9, 0.9, 0.1, 0.1]),
        ([0.5, 0.5, 0.5, 0.5], {0: 7.0, 1: -3.0}, 0.5, [1.0, 0.0, 0.5, 0.5]),
        ([0.5, 0.5], {0: 0.9, 1: 0.6}, 0.5, [0.6, 0.4]),
        ([0.2, 0.2], {0: 0.9}, 0.2, [0.4, 0.0]),
        ([0.9, 0.3, 0.9], {1: 0.0}, 0.6, [0.9, 0.0, 0.9]),
        ([0.9, 0.9, 0.3], {2: 0.0}, 0.7, [1.0, 1.0, 0.1]),
        ([0.5, 0.5], {0: 0.0, 1: 0.0}, 0.5, [0.5, 0.5]),
    ],
)
def test_budgets_keep_their_mean(
    before: list[float], changed: dict[int, float], mean: float, expected: list[float]
) -> None:
    assert with_mean(before, changed, mean) == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def case() -> tiny.TinyCase:
    return sharp(tiny.family("llava"))


@pytest.fixture(scope="module")
def rows(case: tiny.TinyCase) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    single = case.batch("single")
    return [{**single, "pixel_values": torch.randn_like(single["pixel_values"])} for _ in range(2)]


def test_evolved_budgets_change_answers_less(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    def evolved() -> vtc.CompressionConfig:
        return vtc.calibrate(
            case.model,
            None,
            rows,
            method="h2o",
            keep_ratio=0.3,
            sampler="cma-es",
            trials=32,
            progress=False,
            scope="visual",
        )

    config = evolved()
    fractions = config.options["budgets"]
    assert statistics.fmean(fractions) == pytest.approx(0.3, abs=2e-4)
    assert len(fractions) == 4
    assert len(set(fractions)) > 1
    assert config == evolved(), "the seed decides"
    judge = _Judge(case.model, rows)
    equal = judge(vtc.CompressionConfig("h2o", keep_ratio=0.3, options={"budgets": "uniform"}))
    assert judge(config) < equal
    assert not vtc.is_compressed(case.model)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_what_is_judged_is_the_divergence_of_the_steps_to_come(name: str) -> None:
    """One pass over a continuation says what generating it step by step does."""
    case = sharp(tiny.family(name))
    prompt = dict(case.batch("single"))
    judge = _Judge(case.model, [prompt])
    config = vtc.CompressionConfig("streaming", keep_ratio=0.3)
    found = judge(config)
    (spoken,) = judge.spoken
    width = prompt["input_ids"].shape[1]
    with vtc.compressed(case.model, config) as model:
        out = model.generate(
            **prompt,
            max_new_tokens=spoken.shape[1],
            prefix_allowed_tokens_fn=lambda _, ids: [int(spoken[0, len(ids) - width])],
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(out.sequences[:, width:], spoken)
    logp = torch.cat(out.logits[1:]).float().log_softmax(dim=-1)
    (whole,) = judge.whole
    assert found == pytest.approx(float((whole.exp() * (whole - logp)).sum(dim=-1).mean()), rel=1e-4)
    assert found > 0


def test_mistakes_are_refused(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    arguments: dict[str, Any] = {"keep_ratio": 0.3, "sampler": "cma-es", "progress": False}
    with pytest.raises(vtc.ConfigError, match="which divprune is none of"):
        vtc.calibrate(case.model, None, rows, method="divprune", **arguments)
    with pytest.raises(vtc.ConfigError, match="patience: h2o evolves them by itself"):
        vtc.calibrate(case.model, None, rows, method="h2o", patience=3, **arguments)
    with pytest.raises(vtc.ConfigError, match="fixed fractions"):
        vtc.calibrate(case.model, None, rows, method="h2o", budgets=(0.3,) * 4, **arguments)
