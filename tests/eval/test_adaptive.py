"""What adaptive methods keep of plain and of full scenes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

import vtc
from eval import adaptive, models


def test_groups_are_the_extremes() -> None:
    plain, full = adaptive.extremes(6, 2, seed=1)
    every = sorted(
        adaptive.covered(scene) for scene in (*adaptive.extremes(6, 3, seed=1)[0], *adaptive.extremes(6, 3, seed=1)[1])
    )
    assert [adaptive.covered(scene) for scene in (*plain, *full)] == [*every[:2], *every[-2:]]
    assert max(map(adaptive.covered, plain)) < min(map(adaptive.covered, full))


def test_counts_are_those_of_the_report() -> None:
    loaded = models.load("reference")
    scenes = adaptive.extremes(2, 1, seed=1)[0]
    configs = [
        vtc.CompressionConfig("atp", keep_tokens=999, options={"theta_r": 0.0}),
        vtc.CompressionConfig("atp", keep_tokens=999, options={"theta_r": 1.0, "theta_s": 1.0}),
        vtc.CompressionConfig("atp", keep_tokens=999, options={"layers": (2,), "theta_r": 1.0, "theta_s": 1.0}),
    ]
    # Six layers, places behind layers 0, 2 and 4.
    every, fewest, one_place = adaptive.kept(loaded, scenes, configs)
    assert every.tolist() == [[256.0] * 4]
    assert fewest.tolist() == [[(256 + 5) / 6, 1.0, 1.0, 1.0]]
    assert one_place.tolist() == [[(3 * 256 + 3) / 6, 1.0]]


def test_the_table_tells_the_groups_apart() -> None:
    counts = np.stack([np.array([[10.0, 5.0], [12.0, 6.0], [20.0, 9.0], [26.0, 10.0]])])
    line = adaptive.table(["mine"], counts, np.array([3, 5, 70, 90]), 2).splitlines()[-1]
    assert line.startswith("| mine | 17.0 ± 6.4 | 11.0 | 23.0 | +12.0 (")
    assert "| +1.00, 0 |" in line
    assert line.endswith("| 5.5 9.5 |")
