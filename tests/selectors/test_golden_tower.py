"""Methods of the vision tower against the authors' own functions; see tests/golden/README.md."""

from __future__ import annotations

import pytest
import torch

from tests.selectors.test_golden import case, load
from vtc.functional import select

# --- PixelPrune ------------------------------------------------------------------------------------------------------

SIMILARITY = {"max": "max", "mae": "mean", "rmse": "rms"}


@pytest.mark.parametrize("prefix", ["c0_", "c2_", "c3_", "c5_", "c6_"])
def test_pixelprune(prefix: str) -> None:
    golden = case(load("pixelprune.npz"), prefix)
    frames, height, width = golden["grid_thw"].tolist()
    merge = golden["merge"]
    selection = select(
        "pixelprune",
        block_pixels=golden["pixel_values"].unflatten(0, (-1, merge**2)).flatten(1),
        grid_thw=(frames, height // merge, width // merge),
        keep_tokens=10**6,
        similarity=SIMILARITY[golden["metric"]],
        tau=golden["threshold"],
        anchored=golden["anchored"],
    )
    assert torch.equal(selection.keep, golden["keep_merged"])
