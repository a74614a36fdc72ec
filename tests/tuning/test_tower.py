"""Thresholds in the vision tower, scaled to a cost."""

from __future__ import annotations

import pytest
import torch

import vtc
from tests import tiny
from tests.invariants.matrix import build
from vtc.selectors import adaptive_sparse_vit
from vtc.tuning.tower import fit_multiplier, tower_share


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_multiplier_meets_a_share() -> None:
    case = build(tiny.family("llava"))
    samples = [case.collate((tiny.Row(name, 4, ((None, 0),), 5),)) for name in range(6)]
    case.model(**samples[0])
    hooks = hooks_of(case.model)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    shares = []
    for share in (0.9, 0.75, 0.6):
        config = fit_multiplier(case.model, None, samples, share=share, tolerance=0.02)
        assert config.method == "adaptive-sparse-vit"
        shares.append(tower_share(case.model, config, samples))
        assert shares[-1] == pytest.approx(share, abs=0.021)
    assert not vtc.is_compressed(case.model)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    assert hooks_of(case.model) == hooks


def test_a_share_is_counted_by_hand() -> None:
    case = build(tiny.family("llava"))
    samples = [case.batch("single")]
    config = vtc.CompressionConfig("random", keep_ratio=0.25, at="vision:2")
    width = case.model.config.vision_config.hidden_size
    block = case.model.model.vision_tower.encoder.layers[0]
    matrices = sum(weight.numel() for weight in block.parameters() if weight.dim() == 2)
    cost = {m: matrices * m + 2 * width * m**2 for m in (17, 5)}
    expected = (2 * cost[17] + 2 * cost[5]) / (4 * cost[17])
    assert tower_share(case.model, config, samples) == pytest.approx(expected)
    full = adaptive_sparse_vit.arithmetic_share([17, 17, 5, 5], width, 17)
    assert float(full) == pytest.approx(expected, abs=0.05)  # that takes the MLP for four times as wide


def test_what_cannot_be_met_is_said() -> None:
    case = build(tiny.family("llava"))
    samples = [case.batch("single")]
    with pytest.raises(vtc.ConfigError, match=r"cannot leave 0\.05 of the tower"):
        fit_multiplier(case.model, None, samples, share=0.05)
    with pytest.raises(vtc.ConfigError, match="share must lie between 0 and 1"):
        fit_multiplier(case.model, None, samples, share=1.5)
    with pytest.raises(vtc.ConfigError, match="multiplier"):
        fit_multiplier(case.model, None, samples, share=0.5, method="divprune")
    with pytest.raises(vtc.InputError, match="at least one sample"):
        fit_multiplier(case.model, None, [], share=0.5)
    assert not vtc.is_compressed(case.model)
