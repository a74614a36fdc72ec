"""Cost of trained methods: every setting is measured, and untrained modules fit the shape that is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("av", reason="clips go through H.264")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

import vtc.reference
from eval import learned_cost
from eval.train_learned import METHODS
from vtc.bench._whole_models import WHOLE_MODELS


def test_every_setting_is_measured(tmp_path: Path) -> None:
    modules, table = vtc.reference.modules("llava"), tmp_path / "cost.json"
    shipped = [str(modules[name]) for name in ("llava-mini-4", "crosslmm-4")]
    learned_cost.main(["time", *shipped, "--tokens", "4", "--rounds", "1", "--table", str(table)])
    rows = json.loads(table.read_text())["rows"]
    assert [row["setting"] for row in rows] == ["all tokens", "pool 4", "vtc 4", "llava-mini 4", "crosslmm 4"]
    assert rows[0]["share"] == 1.0
    assert all(row["ttft"] > 0 and row["peak_mib"] > 0 for row in rows)


@pytest.mark.parametrize("method", METHODS)
def test_untrained_modules_fit_the_shape_that_is_timed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = WHOLE_MODELS["llava-1.5-7b"].config(5)
    text = config.text_config
    sizes = (text.hidden_size, text.num_attention_heads, text.intermediate_size)
    assert sizes == (learned_cost.WIDTH, learned_cost.HEADS, learned_cost.HIDDEN)
    monkeypatch.setattr(learned_cost, "WIDTH", 256)  # to draw fewer weights
    monkeypatch.setattr(learned_cost, "HIDDEN", 64)
    modules, module = learned_cost.untrained(method, tokens=16, layers=5, fusion=1)
    assert (modules.vision_width, modules.decoder_layers) == (config.vision_config.hidden_size, 5)
    assert getattr(module, "layers", (4,)) == (4,), "one of five"
    assert config.vision_config.num_hidden_layers + config.vision_feature_layer == learned_cost.FEATURE_LAYER
