"""Training and measuring ATP's modules: the commands run, and slopes are those of the counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

from eval import train_atp
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import make_scene


def test_trains_and_compares(tmp_path: Path) -> None:
    folder, table = tmp_path / "made", tmp_path / "table.json"
    train_atp.main(["train", "--scenes", "2", "--steps", "1", "--out", str(folder)])
    train_atp.main(["compare", str(folder), "--scenes", "2", "--questions", "2", "--needs", "1", "--out", str(table)])
    found = json.loads(table.read_text())
    assert found["questions"] == 4
    free, fixed = found["made"]["kept"]["modules"], found["made"]["kept"]["plan"]
    assert fixed[1:] == pytest.approx(free[1:], abs=1.0), "the plan is given the mean of the modules"
    # Six layers, places behind layers 0, 2 and 4.
    assert free[0] == pytest.approx((256 + 2 * free[1] + 2 * free[2] + free[3]) / 6)
    assert found["vtc, before the decoder"]["kept"] == round(free[0])
    assert found["made"]["accuracy"]["plan"][0] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found["need"]["slope"]["per doubling of the need"]["all"][0] == pytest.approx(1.0)


def test_slopes_and_intervals() -> None:
    chance = np.random.default_rng(0)
    objects, need = chance.integers(1, 7, 400).astype(float), chance.integers(1, 4, 400).astype(float)
    kept = 10 + 2 * objects - need
    np.testing.assert_allclose(train_atp.slopes(kept, objects, need), [2, -1])
    scenes = [make_scene("test", 9, index) for index in range(3)]
    asked = [(i, scene, question) for i, scene in enumerate(scenes) for question in ask(scene, 2)]
    values = np.array([float(i) for i, _, _ in asked])
    mean, low, high = train_atp.bootstrap(asked, lambda at: float(values[at].mean()))
    assert (low, mean, high) == (0.0, 1.0, 2.0)
