"""Against the authors' own functions; see tests/golden/README.md. Everything goes through `vtc.select`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vtc.core.signals import ClsAttention
from vtc.core.sites import DecoderLayer
from vtc.core.stage import ModelShape
from vtc.functional import select
from vtc.kernels import farthest_point
from vtc.kernels.reference import cosines
from vtc.registry import get_selector
from vtc.selectors import VtcClsSelector

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return {key: file[key].item() if file[key].ndim == 0 else torch.from_numpy(file[key]) for key in file.files}


def case(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


VTC_CLS = sorted(path.name for path in GOLDEN.glob("vtccls_*.npz"))
DIVPRUNE = sorted(path.name for path in GOLDEN.glob("divprune_*.npz"))


def test_all_files_are_there() -> None:
    assert len(VTC_CLS) >= 12
    assert len(DIVPRUNE) >= 3


@pytest.mark.parametrize("name", VTC_CLS)
def test_vtc_cls(name: str) -> None:
    golden = load(name)
    depth = golden["cls_rows"].shape[0]
    selector = get_selector("vtc-cls", start_layer=golden["start_layer"])
    (signal,) = selector.stages(ModelShape(32, depth, depth - 2))[0].requires
    layers = signal.vision_layers(depth, depth - 2)
    assert layers == tuple(range(depth))[golden["start_layer"] : depth - 1]  # counted from the end if negative
    rows = golden["cls_rows"][list(layers), 0, :, 1:]
    selection = select("vtc-cls", cls_attention=rows, keep_tokens=golden["token_num"])

    half = golden["scores"].dtype == torch.float16
    scores = rows.float().mean(1).sum(0)
    torch.testing.assert_close(scores, golden["scores"].float(), rtol=1e-4, atol=2e-3 if half else 1e-5)
    if "ties" in name or "all_equal" in name:
        kept, theirs = scores[selection.keep], scores[golden["kept_indices"]]
        torch.testing.assert_close(kept.sort().values, theirs.sort().values, rtol=1e-4, atol=1e-5)
        assert kept.min() >= scores[~selection.mask].max()
    else:
        assert torch.equal(selection.keep, golden["kept_indices"])
        assert torch.equal(selection.merge(golden["features"][0]), golden["out"][0])


def test_vtc_cls_all_equal_keeps_the_first() -> None:
    golden = load("vtccls_07_all_equal_l6_h2_n20_start3_u7.npz")
    selection = select("vtc-cls", cls_attention=golden["cls_rows"][3:5, 0, :, 1:], keep_tokens=7)
    assert selection.keep.tolist() == list(range(7))


def test_vtc_cls_default_layers_are_the_released_ones() -> None:
    (stage,) = VtcClsSelector().stages(ModelShape(32, 24, 22))
    assert stage.requires == (ClsAttention(tuple(range(16, 23))),)


@pytest.mark.parametrize("name", [name for name in DIVPRUNE if "duplicates" not in name])
def test_divprune(name: str) -> None:
    golden = load(name)
    order = golden["selected_in_order"]
    torch.testing.assert_close(1 - cosines(golden["x"]), golden["distance"], rtol=1e-4, atol=1e-5)
    assert torch.equal(farthest_point(golden["x"], len(order)), order)
    assert torch.equal(select("divprune", features=golden["x"], keep_ratio=golden["ratio"]).keep, order.sort().values)


def test_divprune_duplicates_cover_the_prototypes_and_stay_distinct() -> None:
    golden = load("divprune_04_duplicates_n20_r0.4.npz")
    prototype = golden["x"].unique(dim=0, return_inverse=True)[1]
    order = farthest_point(golden["x"], 8)
    assert len(set(order.tolist())) == 8
    assert len(set(prototype[order[:5]].tolist())) == 5 == len(set(prototype.tolist()))
    assert select("divprune", features=golden["x"], keep_ratio=golden["ratio"]).k == 8


@pytest.mark.parametrize("prefix", ["c0_", "c2_", "c3_", "c5_", "c6_"])
def test_divprune_peer(prefix: str) -> None:
    golden = case(load("divprune.npz"), prefix)
    assert golden["f64_order_equal"]
    assert torch.equal(farthest_point(golden["x"], len(golden["order"])), golden["order"])
    assert torch.equal(select("divprune", features=golden["x"], keep_ratio=golden["ratio"]).keep, golden["kept_sorted"])


def test_divprune_peer_every_row_twice() -> None:
    golden = case(load("divprune.npz"), "c4_")
    selection = select("divprune", features=golden["x"], keep_ratio=golden["ratio"])
    assert selection.k == len(golden["order"])
    assert selection.merge(golden["x"]).unique(dim=0).shape[0] == selection.k, (
        "a copy was kept while originals remained"
    )


@pytest.mark.parametrize("prefix", ["c0_", "c2_", "c3_"])
def test_fastv(prefix: str) -> None:
    golden = case(load("fastv.npz"), prefix)
    start, length = golden["image_start"], golden["image_len"]
    stage = get_selector("fastv", layer=golden["K"]).stages()[0]
    assert stage.site == DecoderLayer(golden["K"])
    assert stage.site.layer - 1 == golden["layer_whose_attention_is_used"]
    rows = golden["attn_last_query"][0, :, None, start : start + length]
    selection = select("fastv", text_attention=rows, keep_ratio=1 - golden["R"], layer=golden["K"])
    assert selection.k == golden["n_image_kept"]
    text = [i for i in range(golden["seq_len"]) if not start <= i < start + length]
    assert sorted([*text, *(selection.keep + start).tolist()]) == golden["keep_indices"].tolist()
