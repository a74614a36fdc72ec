"""Methods of the vision tower against the authors' own functions; see tests/golden/README.md."""

from __future__ import annotations

import pytest
import torch

from tests.selectors.test_golden import case, load
from vtc.core.context import VisualContext
from vtc.core.sites import BeforeDecoder, VisionLayer
from vtc.core.stage import ModelShape
from vtc.functional import select
from vtc.registry import get_selector
from vtc.selectors.flowcut import InformationFlow, accumulated

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


# --- FlowCut ---------------------------------------------------------------------------------------------------------


def test_flowcut() -> None:
    golden = case(load("flowcut.npz"), "c0_")
    depth, target = golden["layers"], golden["target"] - 1  # theirs counts [CLS]
    remaining = [golden[f"l{layer}_rpl"] for layer in range(depth)]
    selector = get_selector("flowcut").resolve(ModelShape(32, depth + 1, depth - 1), None)
    assert selector.layers == tuple(layer for layer, rest in enumerate(remaining) if rest % 2 == 0)
    kept, values = torch.arange(golden["N"]), torch.empty(0, 2, golden["N"])
    for layer in range(depth):
        attention, semantic = golden[f"l{layer}_cls_attn_heads"][0].mean(dim=0), golden[f"l{layer}_semantic"][0]
        share = attention / attention.sum()
        score = (share + semantic / semantic.sum()) * golden[f"l{layer}_value"][0].abs().sum(dim=1)
        values = torch.cat([values, torch.stack([share, score])[None]])
        if layer in selector.layers:
            context = VisualContext(
                features=torch.zeros(len(kept), 1),
                budget=target,
                generator=torch.Generator(),
                grids=((1, 1, len(kept)),),
                site=VisionLayer(layer + 1) if layer < depth - 1 else BeforeDecoder(),
                tokens_at_input=golden["N"],
                signals={InformationFlow(): values},
            )
            keep = selector.select(context.check()).keep
            kept, values = kept[keep], values[:, :, keep]
        assert torch.equal(kept, golden[f"l{layer}_keep"][0])
        assert len(kept) + 1 == golden["seq_lens"][layer]
        torch.testing.assert_close(accumulated(values[:, 1]), golden[f"l{layer}_cumulative"][0], rtol=1e-4, atol=1e-5)
