"""Methods of the vision tower against the authors' own functions; see tests/golden/README.md."""

from __future__ import annotations

import pytest
import torch

from tests.selectors.test_golden import GOLDEN, case, load
from vtc import kernels
from vtc.core.context import VisualContext
from vtc.core.observations import VisionAttention
from vtc.core.sites import BeforeDecoder, VisionLayer
from vtc.core.stage import ModelShape
from vtc.functional import select
from vtc.registry import get_selector
from vtc.selectors.adaptive_sparse_vit import (
    HeadWeightedAttention,
    block_macs,
    masked_attention,
    straight_through,
    token_scores,
)
from vtc.selectors.flowcut import InformationFlow, accumulated
from vtc.selectors.vscan import best_of_windows

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


# --- Adaptive Sparse ViT ---------------------------------------------------------------------------------------------

SCORES = sorted(path.name for path in GOLDEN.glob("asvit_score_*.npz"))
MASKS = sorted(path.name for path in GOLDEN.glob("asvit_mask_*.npz"))


def test_all_files_are_there() -> None:
    assert len(SCORES) >= 3
    assert len(MASKS) >= 3


@pytest.mark.parametrize("name", SCORES)
def test_asvit_scores(name: str) -> None:
    golden = load(name)
    attention = masked_attention(golden["q"], golden["k"], golden["scale"], golden.get("policy"))
    torch.testing.assert_close(token_scores(attention, golden["v"]), golden["score"], rtol=1e-4, atol=1e-5)
    output = (attention @ golden["v"]).transpose(1, 2).flatten(2)
    projected = output @ golden["proj_weight"].T + golden["proj_bias"]
    torch.testing.assert_close(projected, golden["attn_out_after_proj"], rtol=1e-4, atol=1e-5)
    if "policy" not in golden:
        raw = VisionAttention(golden["q"], golden["k"], golden["v"], golden["scale"], prefix=1)
        scores = HeadWeightedAttention().compute(raw)[:, 1:]
        torch.testing.assert_close(scores, golden["score"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_asvit_masks(name: str) -> None:
    golden = load(name)
    score, theta = golden["score"].requires_grad_(), torch.tensor(golden["theta"], requires_grad=True)
    mask = straight_through(score, theta, golden["tau"])
    mask.backward(golden["upstream_grad"])
    torch.testing.assert_close(mask, golden["mask_forward"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score.grad, golden["grad_score"], rtol=2e-2, atol=1e-5)
    torch.testing.assert_close(theta.grad.item(), golden["grad_theta"], rtol=2e-2, atol=1e-5)
    # In use every picture has its own number, where theirs takes the floor of the batch's mean.
    n = score.shape[1]
    for row, one in enumerate(score.detach()):
        kept = select(
            "adaptive-sparse-vit", head_weighted_attention=one, keep_tokens=n, thresholds=n * golden["theta"]
        ).mask
        expected = golden["eval_keep_mask"][row] if len(score) == 1 else golden["mask_forward"][row].bool()
        assert torch.equal(kept, expected)
    if len(score) > 1:
        assert golden["eval_batch_keep_count"] == int(golden["mask_forward"].sum()) // len(score)
        best = [kernels.topk_indices(one, golden["eval_batch_keep_count"]) for one in score.detach()]
        assert torch.equal(torch.stack(best), golden["eval_batch_keep_indices"].sort().values)


def test_asvit_arithmetic() -> None:
    golden = load("asvit_flops_block.npz")
    for width in (192, 384, 768):
        ours = block_macs(golden["tokens"], width) / 1e9
        torch.testing.assert_close(ours, golden[f"gmacs_d{width}"], rtol=1e-4, atol=1e-5)


# --- VScan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("vscan_qwen_*.npz")))
def test_vscan(name: str) -> None:
    golden = load(name)
    rows, columns = golden["grid"].tolist()
    selection = select(
        "vscan",
        features=golden["features"],
        received_attention=torch.stack([golden["attn_local"], golden["attn_global"]])[:, None],
        grid_thw=(1, rows, columns),
        keep_tokens=golden["k"],
        score_source="received",
        window=golden["window"],
    )
    assert torch.equal(selection.keep, golden["keep_sorted"])
    torch.testing.assert_close(selection.merge(golden["features"]), golden["merged"], rtol=1e-4, atol=1e-5)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) // golden["window"]
    across = torch.tensor([rows, columns]) // golden["window"]
    places = torch.minimum(places, across - 1)
    local = best_of_windows(golden["attn_local"], places[:, 0] * across[1] + places[:, 1], golden["k"] // 2)
    assert local.tolist() == golden["local_indices_order"].tolist()
