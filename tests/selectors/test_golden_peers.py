"""Methods of other groups against their own functions; see tests/golden/README.md.

Cases with several pictures are selected from one by one. Cases on which the authors' code fails are checked by what
ours does instead.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.selectors.test_golden import case, load
from vtc import kernels
from vtc.core.signals import ReceivedAttention
from vtc.core.stage import ModelShape
from vtc.errors import ConfigError, InputError
from vtc.functional import select
from vtc.selectors import HiPruneSelector
from vtc.selectors.cdpruner import quality_of, relevance_to_text
from vtc.selectors.visionzip import MeanKeys

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def prefixes(name: str, key: str, **wanted: Any) -> list[str]:
    """The cases of a file that have this array, and these values."""
    arrays = load(f"{name}.npz")
    found = [prefix.removesuffix(key) for prefix in arrays if prefix.endswith(f"_{key}")]
    return [p for p in found if all(arrays.get(p + name, value) == value for name, value in wanted.items())]


def pictures(golden: dict[str, Any], *names: str) -> list[tuple[Tensor, ...]]:
    """Of every picture of a case its part of these arrays."""
    return list(zip(*(golden[name].unbind(0) for name in names), strict=True))


def test_all_files_are_there() -> None:
    counts = {
        name: len(prefixes(name, key)) for name, key in (("cdpruner", "T"), ("fastervlm", "T"), ("vispruner", "T"))
    }
    assert counts == {"cdpruner": 4, "fastervlm": 2, "vispruner": 5}
    assert len(prefixes("visionzip", "hidden")) == 4
    assert len(prefixes("scope", "K")) == 4
    assert len(prefixes("holov", "K")) == 5
    assert len(prefixes("hiprune", "mask")) == 3


# --- cdpruner --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", prefixes("cdpruner", "T", f64_equal=True))
def test_cdpruner(prefix: str) -> None:
    golden = case(load("cdpruner.npz"), prefix)
    tiles = pictures(golden, "image_features", "mask")
    relevance = torch.stack([relevance_to_text(embeds, golden["text_embeds"]) for embeds in golden["image_embeds"]])
    # The released code brings the relevance of all tiles to one range, and chooses in each.
    quality = quality_of(-relevance.flatten()).view_as(relevance)
    for (features, mask), weights in zip(tiles, quality, strict=True):
        kept = kernels.dpp_greedy(features, golden["T"], weights).sort().values
        assert torch.equal(kept, mask.nonzero()[:, 0])


def test_cdpruner_is_made_of_these_parts() -> None:
    golden = case(load("cdpruner.npz"), "c0_")
    x, text = golden["image_embeds"][0], golden["text_embeds"]
    for similarity, sign in (("direct", 1), ("inverted", -1)):
        quality = quality_of(sign * relevance_to_text(x, text))
        selection = select("cdpruner", features=x, text_embeds=text, keep_tokens=16, similarity=similarity)
        assert torch.equal(selection.keep, kernels.dpp_greedy(x, 16, quality).sort().values)


def test_cdpruner_beyond_the_rank_keeps_the_budget() -> None:
    """Where the authors' code keeps too few; and equal relevance is no relevance, instead of a division by 0."""
    golden = case(load("cdpruner.npz"), "c4_")
    assert golden["kept"] < golden["T"]
    quality = quality_of(-relevance_to_text(golden["image_embeds"][0], golden["text_embeds"]))
    kept = kernels.dpp_greedy(golden["image_features"][0], golden["T"], quality)
    assert len(set(kept.tolist())) == golden["T"]
    x, equal = golden["image_features"][0], torch.ones(3)
    assert torch.equal(quality_of(equal), equal)
    assert torch.equal(quality_of(relevance_to_text(x, x[:0])), torch.ones(len(x)))
    with pytest.raises(InputError, match="text_embeds are 24 wide and the features 12"):
        select("cdpruner", features=x, text_embeds=golden["text_embeds"], keep_tokens=3)


# --- visionzip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", prefixes("visionzip", "hidden"))
def test_visionzip(prefix: str) -> None:
    golden = case(load("visionzip.npz"), prefix)
    assert golden["f64_equal"]
    dominant, contextual = golden["info_dominant"], golden["info_contextual"]
    for hidden, metric, rows, indices, out in pictures(
        golden, "hidden", "metric", "attn_cls_row", "all_indices", "out_tokens"
    ):
        selection = select(
            "visionzip",
            signals={MeanKeys: metric[1:]},
            cls_attention=rows[None, :, 1:],
            keep_tokens=dominant + contextual,
            contextual=contextual / (dominant + contextual),
        )
        theirs = indices[1:].sort().values - 1  # after [CLS], by attention; the tokens are in their order
        chosen = torch.isin(selection.keep, theirs)
        assert torch.equal(selection.keep[chosen], theirs)
        merged = selection.merge(hidden[1:])
        torch.testing.assert_close(merged[chosen], out[1 : 1 + dominant], **TOLERANCE)
        torch.testing.assert_close(merged[~chosen], out[1 + dominant :], **TOLERANCE)


# --- fastervlm and vispruner -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", prefixes("fastervlm", "T"))
def test_fastervlm(prefix: str) -> None:
    golden = case(load("fastervlm.npz"), prefix)
    for rows, mask in pictures(golden, "attn_cls", "mask"):
        selection = select("fastervlm", cls_attention=rows[None], keep_tokens=golden["T"])
        assert torch.equal(selection.mask, mask.bool())


def _vispruner(golden: dict[str, Any], x: Tensor, rows: Tensor) -> Tensor:
    ratio = golden["important_ratio"]
    options = {"keep_tokens": golden["T"], "important_ratio": ratio}
    return select("vispruner", pre_projector=x, cls_attention=rows[None], **options).mask


@pytest.mark.parametrize("prefix", prefixes("vispruner", "T", raises=False))
def test_vispruner(prefix: str) -> None:
    golden = case(load("vispruner.npz"), prefix)
    assert golden["f64_equal"]
    for x, rows, mask in pictures(golden, "features", "attn_cls", "mask"):
        assert torch.equal(_vispruner(golden, x, rows), mask.bool())


def test_vispruner_lists_of_odd_length() -> None:
    golden = case(load("vispruner.npz"), "c6_")
    assert golden["raises"]
    ((x, rows),) = pictures(golden, "features", "attn_cls")
    mask = _vispruner(golden, x, rows)
    assert int(mask.sum()) == golden["T"]
    assert bool(mask[rows.mean(dim=0).topk(29).indices].all())


# --- scope -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", prefixes("scope", "K"))
def test_scope(prefix: str) -> None:
    golden = case(load("scope.npz"), prefix)
    assert golden["f64_order_equal"]
    options = {"combine": {"multi": "multiply", "add": "add"}[golden["combined"]], "keep_tokens": golden["K"]}
    for x, attention, order in pictures(golden, "x", "cls_attn", "order"):
        rows = attention[None, None] / 2  # of two heads, summed
        alpha = golden["alpha"] if golden["use_attn"] else 0.0
        selection = select("scope", pre_projector=x, cls_attention=rows.expand(1, 2, -1), alpha=alpha, **options)
        assert torch.equal(selection.keep, order.sort().values)


# --- holov -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", prefixes("holov", "K"))
def test_holov(prefix: str) -> None:
    golden = case(load("holov.npz"), prefix)
    qwen = golden["variant"] == "qwen"
    attentions, indices = (value[None] if qwen else value for value in (golden["attn"], golden["indices"]))
    for x, attention, out, kept in zip(golden["x"], attentions, golden["out"], indices, strict=True):
        options = {"keep_tokens": golden["K"], "crops": golden["num_patches"]}
        selection = select("holov", pre_projector=x, cls_attention=attention[None, None], **options)
        assert torch.equal(selection.keep, kept.sort().values)
        assert torch.equal(selection.merge(x), out[kept.sort().indices])
        if qwen:
            options["crops"] = None
            assert torch.equal(
                select("holov", pre_projector=x, cls_attention=attention[None, None], **options).keep, selection.keep
            )


def test_holov_surplus_goes_to_the_other_crops() -> None:
    """Where the released code returns tokens of zeros."""
    attention = torch.zeros(1, 1, 12)
    attention[..., :3] = 1.0  # the first of four crops is worth everything
    x = torch.eye(12)
    selection = select("holov", pre_projector=x, cls_attention=attention, keep_tokens=8, crops=4)
    assert selection.keep.tolist() == [0, 1, 2, 3, 4, 6, 7, 9]
    nothing = torch.zeros(1, 1, 12)
    assert select("holov", pre_projector=x, cls_attention=nothing, keep_tokens=11, crops=4).k == 11


# --- hiprune ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("prefix", prefixes("hiprune", "mask"))
def test_hiprune(prefix: str, variant: str) -> None:
    golden = case(load("hiprune.npz"), prefix)
    width, tiles = golden["width"], pictures(golden, "shallow", "deep", "mask")
    for shallow, deep, mask in tiles:
        budget = golden["retention"] // len(tiles)
        selection = select(
            "hiprune",
            received_attention=torch.stack([shallow, deep])[:, None],
            grid_thw=(1, len(shallow) // width, width),
            keep_tokens=budget,
            alpha=golden["alpha"],
            variant=variant,
        )
        if variant == "released":
            assert torch.equal(selection.mask, mask.bool())
        anchors = shallow.topk(round(budget * golden["alpha"] / 5)).indices
        inside = anchors[(anchors % width > 0) & (anchors % width < width - 1)]
        assert bool(selection.mask[torch.cat([anchors, inside - 1, inside + 1])].all())


def test_hiprune_neighbours_lie_in_the_picture() -> None:
    shallow, deep = torch.zeros(12), torch.linspace(0, 1, 12)
    shallow[4] = 1.0  # at the left edge of the second of three rows
    scores = torch.stack([shallow, deep])[:, None]
    kept = {
        variant: select(
            "hiprune", received_attention=scores, grid_thw=(1, 3, 4), keep_tokens=5, alpha=1.0, variant=variant
        ).keep.tolist()
        for variant in ("paper", "released")
    }
    assert kept == {"paper": [0, 4, 5, 8, 11], "released": [0, 3, 4, 5, 8]}
    tiles = select("hiprune", received_attention=scores, grid_thw=[(1, 1, 4)] * 3, keep_tokens=5, alpha=1.0).keep
    assert tiles.tolist() == [4, 5, 9, 10, 11], "other tiles are no neighbours"
    few = select("hiprune", received_attention=scores, grid_thw=(1, 3, 4), keep_tokens=3, alpha=1.0).keep
    assert len(few) == 3


def test_hiprune_without_anchors_and_its_layers() -> None:
    scores = torch.stack([torch.linspace(1, 0, 12), torch.linspace(0, 1, 12)])[:, None]
    kept = select("hiprune", received_attention=scores, grid_thw=(1, 3, 4), keep_tokens=5)  # round(0.1) anchors
    assert kept.keep.tolist() == [7, 8, 9, 10, 11]
    shapes = {(24, 22): (8, 22), (32, 31): (15, 31), (12, 11): (3, 11), (1, 0): (0,)}
    for (depth, feature), layers in shapes.items():
        (stage,) = HiPruneSelector().stages(ModelShape(32, depth, feature))
        assert stage.requires[0] == ReceivedAttention(layers)
    with pytest.raises(ConfigError, match="object_layer=23"):
        HiPruneSelector(object_layer=23).stages(ModelShape(32, 24, 22))
