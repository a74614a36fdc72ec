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
from vtc.core.context import VisualContext
from vtc.core.observations import DecoderAttention, DecoderHidden, EnteredAttention, PromptText, VisionAttention
from vtc.core.selection import Selection
from vtc.core.signals import HiddenStates, MeanKeys, ReceivedAttention, TextEmbeds
from vtc.core.sites import DecoderLayer
from vtc.core.stage import ModelShape
from vtc.errors import ConfigError, InputError
from vtc.functional import select
from vtc.registry import get_selector
from vtc.selectors import HiPruneSelector
from vtc.selectors.cdpruner import blended
from vtc.selectors.dart import KeyLength, PromptStates, TextPivots, unlike
from vtc.selectors.prumerge import PruMergePlusSelector, WideClsAttention, outliers
from vtc.selectors.pyramiddrop import EnteringAttention
from vtc.selectors.sparsevlm import Raters, TextRows, TextRowsOfHeads, clustered, raters_of, score_text
from vtc.selectors.text_relevance import quality_of, relevance_to_text

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
PROBABILITY = {"rtol": 1e-4, "atol": 1e-7}  # of one token among hundreds, which is as small as the other tolerance


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
    assert len(prefixes("prumerge", "hidden")) == 4
    assert len(prefixes("dart", "keys")) == 4
    assert len(prefixes("sparsevlm", "attn_text_visual")) == 7
    assert len(prefixes("pyramiddrop", "x")) == 1


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


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_cdpruner_blends_relevance_into_the_kernel(weight: float) -> None:
    """Against determinants of the kernel as it is written."""
    draw = torch.Generator().manual_seed(4)
    x, text = torch.randn(9, 5, generator=draw, dtype=torch.float64), torch.randn(3, 5, generator=draw)
    relevance = quality_of(relevance_to_text(x, text)).double()
    unit = x / x.norm(dim=1, keepdim=True)
    kernel = ((1 - weight) + weight * relevance[:, None] * relevance) * (unit @ unit.T)
    rows, norms = blended(x, relevance.float(), weight)
    made = torch.nn.functional.normalize(rows.double(), dim=1)
    torch.testing.assert_close(
        norms[:, None] * (made @ made.T) * norms, kernel, rtol=1e-5, atol=1e-6, check_dtype=False
    )
    picked: list[int] = []
    for _ in range(4):
        worth = [-1.0 if i in picked else float(torch.det(kernel[[*picked, i]][:, [*picked, i]])) for i in range(9)]
        picked.append(max(range(9), key=worth.__getitem__))
    options = {"keep_tokens": 4, "relevance_weight": weight}
    assert select("cdpruner", features=x, text_embeds=text, **options).keep.tolist() == sorted(picked)


def test_cdpruner_reads_the_text_that_it_is_told_to() -> None:
    raw = PromptText(torch.arange(4), torch.randn(4, 3), behind=torch.tensor([False, False, True, True]))
    (stage,) = get_selector("cdpruner", text="after").stages()
    assert torch.equal(stage.requires[0].compute(raw), raw.embeddings[2:])
    (stage,) = get_selector("cdpruner").stages()
    assert torch.equal(stage.requires[0].compute(raw), raw.embeddings)
    for options in ({"text": "before"}, {"relevance_weight": 1.5}):
        with pytest.raises(ConfigError, match=f"cdpruner: {next(iter(options))} must be"):
            get_selector("cdpruner", **options)


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
    for rows, mask, score in pictures(golden, "attn_cls", "mask", "score"):
        selection = select("fastervlm", cls_attention=rows[None], keep_tokens=golden["T"])
        assert torch.equal(selection.mask, mask.bool())
        torch.testing.assert_close(rows.mean(dim=0), score, **PROBABILITY)


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
    important = _vispruner(golden | {"important_ratio": 1.0}, x, rows)
    assert torch.equal(important, select("fastervlm", cls_attention=rows[None], keep_tokens=golden["T"]).mask)


@pytest.mark.parametrize("kind", ["noise", "copies", "few relatives"])
def test_vispruner_follows_its_lists(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, in float64; with a hundred copies of every token the closest relatives are all at even places."""
    x = torch.randn(700, 16, generator=torch.Generator().manual_seed(3))
    x = x[:7].repeat(100, 1) if kind == "copies" else x
    if kind == "few relatives":
        monkeypatch.setattr("vtc.selectors.vispruner._NEAR", 3)
        monkeypatch.setattr("vtc.selectors.vispruner._FIRST", 1)
    rows = torch.rand(1, 700, generator=torch.Generator().manual_seed(4))
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    listed = rows[0].sort(descending=True, stable=True).indices
    while len(listed) > 31:
        cosine = (unit[listed[::2]] @ unit[listed[1::2]].T).amax(dim=1)
        cosine = cosine.round(decimals=9)  # copies tie
        ranked = cosine.sort(descending=True, stable=True).indices
        listed = torch.cat([listed[::2][ranked[min(8, len(listed) - 31) :]], listed[1::2]])
    mask = _vispruner({"T": 31, "important_ratio": 0.0}, x, rows)
    assert torch.equal(mask.nonzero()[:, 0], listed.sort().values)


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


def test_hiprune_with_text() -> None:
    """HiPrune++: anchors, then what resembles the text, then registers."""
    scores = torch.stack([torch.zeros(12), torch.linspace(0, 1, 12)])[:, None]
    scores[0, 0, 5] = 1.0
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    options = {"received_attention": scores, "grid_thw": (1, 3, 4), "features": x, "text_embeds": x[[2]], "alpha": 0.5}
    plain, text = (select("hiprune", keep_tokens=10, text=part, **options).keep.tolist() for part in (0.0, 0.1))
    assert plain == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert text == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert select("hiprune", keep_tokens=10, text=1.0, **options).k == 10
    assert TextEmbeds() not in HiPruneSelector().stages()[0].requires
    with pytest.raises(ConfigError, match="hiprune: text"):
        HiPruneSelector(text=1.5)


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


# --- prumerge --------------------------------------------------------------------------------------------------------


def wide_attention(q: Tensor, k: Tensor, heads: int = 4) -> Tensor:
    """What the signal makes of the queries and keys (M, C) of one picture, cut into heads."""
    queries, keys = (part.unflatten(1, (heads, -1)).transpose(0, 1)[None] for part in (q, k))
    return WideClsAttention().compute(VisionAttention(queries, keys, keys, 1.0, prefix=1))[0, 1:]


def prumerged(golden: dict[str, Any], row: int, **options: Any) -> tuple[Selection, Tensor, Tensor]:
    """The selection of one picture, its attention and its merged features."""
    plus = "plus" in golden["fn"]
    q, k, hidden = (golden[name][row] for name in ("q", "k", "hidden"))
    attention = wide_attention(q, k)
    method = "prumerge-plus" if plus else "prumerge"
    selection = select(method, signals={WideClsAttention: attention}, keys=k[1:], **options)
    return selection, attention, selection.merge(hidden[1:])


@pytest.mark.parametrize("prefix", ["c0_", "c2_"])
def test_prumerge_by_outliers(prefix: str) -> None:
    golden = case(load("prumerge.npz"), prefix)
    assert golden["if_adaptive"]
    selection, attention, merged = prumerged(golden, 0, keep_tokens=10**6)
    torch.testing.assert_close(attention, golden["cls_attn"][0], **PROBABILITY)
    count = round(576 * golden["outlier_ratio"])
    assert outliers(attention) == count
    # Theirs are by attention, then the spread in raster order, then the rest.
    best = attention.sort(descending=True, stable=True).indices[:count]
    assert bool(selection.mask[best].all())
    theirs, order = golden["out"][0], best
    if "plus" in golden["fn"]:
        grid = torch.arange(0, 575, int(1 / golden["outlier_ratio"]) // 3)
        order = torch.cat([best, grid[~torch.isin(grid, best)]])
    assert selection.k == len(theirs) == len(order) + 1
    slots = torch.searchsorted(selection.keep, order)
    torch.testing.assert_close(merged[slots], theirs[:-1], **TOLERANCE)
    (last,) = set(range(selection.k)) - set(slots.tolist())
    torch.testing.assert_close(merged[last], theirs[-1], **TOLERANCE)


def test_prumerge_of_a_fixed_ratio_keeps_distinct_tokens() -> None:
    """Where the authors' centres can repeat, and the lowest of the other tokens get lost instead."""
    golden = case(load("prumerge.npz"), "c3_")
    assert not golden["if_adaptive"]
    for row in range(2):
        selection, attention, merged = prumerged(golden, row, keep_tokens=145, count="budget")
        torch.testing.assert_close(attention, golden["cls_attn"][row], **PROBABILITY)
        assert selection.k == golden["out"].shape[1] == 145
        assert bool(selection.mask[attention.topk(72).indices].all())
        spread = torch.arange(4, 576, 8)
        assert bool(selection.mask[spread].all()), "as theirs, but that others stand in for those that are twice"
        # Of theirs, those are as meant whose neighbours are neither twice there nor lost.
        centres = torch.cat([attention.topk(72).indices, spread])
        twice = centres.bincount(minlength=576)
        lost = (twice == 0).nonzero()[: int((twice == 2).sum()), 0]
        unit = torch.nn.functional.normalize(golden["k"][row, 1:], dim=1)
        near = (unit[centres] @ unit.T).scatter(1, centres[:, None], -2.0).topk(32).indices
        meant = (twice[centres] == 1) & (twice[near] < 2).all(dim=1) & ~torch.isin(near, lost).any(dim=1)
        assert int(meant.sum()) > 20
        ours = merged[torch.searchsorted(selection.keep, centres[meant])]
        torch.testing.assert_close(ours, golden["out"][row, :-1][meant], **TOLERANCE)
    centres = PruMergePlusSelector(count="budget").centres(torch.linspace(1, 0, 20), 10).nonzero()[:, 0]
    assert centres.tolist() == [0, 1, 2, 3, 4, 6, 10, 12, 14, 18], "2 of the spread is an outlier"


def test_prumerge_without_outliers_has_one() -> None:
    golden = case(load("prumerge.npz"), "c4_")
    assert golden["raises"]
    selection, attention, _ = prumerged(golden, 0, keep_tokens=10**6)
    torch.testing.assert_close(attention, golden["cls_attn"][0], **PROBABILITY)
    assert outliers(attention) == 1
    assert selection.k == 4, "every 192nd token, of which the first is the outlier, and the rest"


@pytest.mark.parametrize("number", [0, 2, 3])
def test_prumerge_outliers(number: int) -> None:
    golden = case(load("prumerge.npz"), f"iqr_{number}_")
    assert outliers(golden["attn"][0]) == max(1, round(400 * golden["ratio"]))


def test_prumerge_by_hand() -> None:
    """Two centres; the second is among the neighbours of the first."""
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    attention = torch.tensor([0.4, 0.3, 0.2, 0.1])
    options = {"keys": x, "keep_tokens": 3, "neighbours": 1, "signals": {WideClsAttention: attention}}
    selection = select("prumerge", count="budget", **options)
    assert selection.keep.tolist() == [0, 1, 2]
    rest = 0.2 * x[2] + 0.1 * x[3]
    torch.testing.assert_close(selection.merge(x), torch.stack([x[0] + 0.3 * x[1], x[1] + 0.4 * x[0], rest]))
    assert select("prumerge", **options).k == 2, "one outlier, at most a third, and the rest"


# --- dart ------------------------------------------------------------------------------------------------------------


def dart_context(golden: dict[str, Any]) -> VisualContext:
    """What the engine shows the method on entering a decoder layer."""
    state, keys = golden["last_state"], golden["keys"]
    length, start = state.shape[1], golden["image_start"]
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, start : start + golden["image_len"]] = True
    there = torch.ones_like(visual)
    raw = DecoderAttention(keys, keys, keys, 1.0, None, length, there, ~visual, visual, torch.tensor([length - 1]))  # type: ignore[arg-type]
    signals = {
        HiddenStates(): state[visual],
        KeyLength(): KeyLength().compute(raw)[visual],
        TextPivots(golden["pivot_text"]): TextPivots(golden["pivot_text"]).compute(raw)[0],
        PromptStates(): PromptStates().compute(DecoderHidden(state))[0],
    }
    budget, grids = golden["n_kept"], ((1, 1, golden["image_len"]),)
    return VisualContext(state[visual], budget, torch.Generator(), grids, site=DecoderLayer(2), signals=signals).check()


@pytest.mark.parametrize("prefix", prefixes("dart", "keys"))
def test_dart_in_their_order(prefix: str) -> None:
    golden = case(load("dart.npz"), prefix)
    assert golden["f64_set_equal"]
    context, start = dart_context(golden), golden["image_start"]
    pivots = context[KeyLength].sort(descending=True, stable=True).indices[: golden["pivot_image"]]
    assert set((pivots + start).tolist()) == set(golden["image_pivots"].tolist())
    assert set(context[TextPivots].tolist()) == set(golden["text_pivots"].tolist())
    visited = golden["last_state"][0, golden["pivot_visit_order"]]
    kept = unlike(context.features, pivots, visited, golden["n_kept"])
    assert torch.equal(kept.sort().values + start, golden["kept_sorted"])


@pytest.mark.parametrize("prefix", prefixes("dart", "keys"))
def test_dart_in_our_order(prefix: str) -> None:
    """The order of pivots decides who gets what both would take; most is the same."""
    golden = case(load("dart.npz"), prefix)
    selector = get_selector("dart", layer=2, image_pivots=golden["pivot_image"], text_pivots=golden["pivot_text"])
    context = dart_context(golden)
    assert {type(signal) for signal in selector.stages()[0].requires} == {type(signal) for signal in context.signals}
    selection = selector.select(context)
    assert selection.k == golden["n_kept"]
    assert bool(selection.mask[golden["image_pivots"] - golden["image_start"]].all())
    both = torch.isin(selection.keep + golden["image_start"], golden["kept_sorted"])
    assert float(both.float().mean()) > 0.6


def test_dart_before_the_decoder() -> None:
    x = torch.tensor([[9.0, 0.0], [1.0, 0.1], [0.0, 2.0], [-1.0, 0.0], [0.1, -1.0], [1.0, 1.0]])
    text = torch.tensor([[0.0, 5.0], [0.1, 0.1]])
    options = {"features": x, "text_embeds": text, "image_pivots": 1, "text_pivots": 1}
    # Pivot 0 takes the least similar to it, 3; then the text's pivot (0, 5) takes 4.
    assert select("dart", keep_tokens=3, **options).keep.tolist() == [0, 3, 4]
    assert select("dart", keep_tokens=4, **options).keep.tolist() == [0, 2, 3, 4], "two for pivot 0, ties to the lower"
    assert select("dart", keep_tokens=1, **options).keep.tolist() == [0]
    assert select("dart", features=x, keep_tokens=2, image_pivots=1, text_pivots=0).keep.tolist() == [0, 3]
    assert get_selector("dart").stages()[0].requires == (TextEmbeds(),)


# --- sparsevlm -------------------------------------------------------------------------------------------------------

_LISTS = {
    "1_0": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2_0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


def rated(golden: dict[str, Any], budget: int, *, heads: bool = False) -> VisualContext:
    """What the engine shows the method of a case with attention from text to visual tokens."""
    rows = golden["attn_text_visual"][0]  # (H, T, N)
    raters = torch.zeros(rows.shape[1])
    raters[golden["text_rater_idx"]] = 1.0
    attention = {TextRowsOfHeads(): rows.permute(2, 0, 1)} if heads else {TextRows(): rows.mean(dim=0).T}
    n = rows.shape[2]
    return VisualContext(
        torch.zeros(n, 1),
        budget,
        torch.Generator(),
        ((1, 1, n),),
        site=DecoderLayer(3),
        signals={Raters(): raters, **attention, HiddenStates(): torch.zeros(n, 1)},
    ).check()


@pytest.mark.parametrize("prefix", prefixes("sparsevlm", "retain"))
def test_sparsevlm_keeps_what_raters_look_at(prefix: str) -> None:
    golden = case(load("sparsevlm.npz"), prefix)
    plus = golden["version"] == "2_0"
    stage = {2: 0, 6: 1, 15: 2}[golden["layer"]]
    count = min(_LISTS[golden["version"]][golden["retain"]][stage], golden["v_num"] - 1)
    assert count == golden["n_kept"]
    selector = get_selector("sparsevlm", recycle=False, heads=14 if plus else None)
    context = rated(golden, count, heads=plus)
    assert torch.equal(selector.select(context).mask, golden["mask"][0])
    torch.testing.assert_close(selector.score(context), golden["relation"][0], **PROBABILITY)


@pytest.mark.parametrize("prefix", prefixes("sparsevlm", "rank"))
def test_sparsevlm_counts_by_rank(prefix: str) -> None:
    golden = case(load("sparsevlm.npz"), prefix)
    options = {"scale": golden["scale"], "bias": golden["bias"], "recycle": False}
    selector, context = get_selector("sparsevlm-rank", **options), rated(golden, golden["v_num"])
    selection = selector.select(context)
    assert (
        selection.k
        == golden["n_kept"]
        == min(golden["v_num"] - 1, int(golden["rank"] * selector.scale + selector.bias))
    )
    torch.testing.assert_close(selector.score(context), golden["relation"][0], **PROBABILITY)
    assert torch.equal(selection.mask, golden["mask"][0])


@pytest.mark.parametrize("prefix", prefixes("sparsevlm", "merged"))
def test_sparsevlm_clusters(prefix: str) -> None:
    golden = case(load("sparsevlm.npz"), prefix)
    assert golden["noise_invariant"]
    x, clusters = golden["x"][0], golden["cluster_num"]
    centres, cluster = clustered(x, clusters)
    merged = Selection(len(x), centres, cluster).merge(x)
    # Theirs come in the order of their scores.
    nearest = torch.cdist(merged, golden["merged"][0])
    torch.testing.assert_close(merged, golden["merged"][0][nearest.argmin(dim=1)], **TOLERANCE)
    assert sorted(nearest.argmin(dim=1).tolist()) == list(range(clusters))


@pytest.mark.parametrize("prefix", prefixes("sparsevlm", "score"))
def test_sparsevlm_raters(prefix: str) -> None:
    golden = case(load("sparsevlm.npz"), prefix)
    score = score_text(golden["visual"][0], golden["text"][0])
    torch.testing.assert_close(score, golden["score"][0], **PROBABILITY)
    assert torch.equal(raters_of(score).nonzero()[:, 0], golden["rater_idx"])
    assert raters_of(torch.ones(3)).tolist() == [1.0] * 3


@pytest.mark.parametrize(("tokens", "lists"), _LISTS["1_0"].items())
def test_sparsevlm_settings_are_the_released_lists(tokens: int, lists: tuple[int, ...]) -> None:
    """The budget of a stage is the released number and its clusters, from which the number follows."""
    shape = ModelShape(32)
    selector = get_selector("sparsevlm").resolve(shape, tokens / 576)
    assert selector.layers == (3, 7, 16)  # behind the layers 2, 6 and 15
    n = 576
    for stage, released in zip(selector.stages(shape, tokens / 576), lists, strict=True):
        budget = round(n * stage.keep)
        assert selector.kept_of(n, budget) == released
        n = budget
    plain = get_selector("sparsevlm", recycle=False)
    shares = [round(576 * share) for share in plain.shares_of(tokens / 576)]
    assert tuple(shares) == _LISTS["2_0"][tokens]


# --- pyramiddrop -----------------------------------------------------------------------------------------------------


def _rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of (B, H, L, d) as in Llama, base 10,000."""
    half = x.shape[-1] // 2
    angle = positions[:, None, :, None] / 10000 ** (torch.arange(half) / half)
    cos, sin = torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@pytest.mark.parametrize("prefix", prefixes("pyramiddrop", "kept_positions"))
def test_pyramiddrop(prefix: str) -> None:
    golden = case(load("pyramiddrop.npz"), prefix)
    x, there = golden["x"], golden["attention_mask"].bool()
    rows, length, heads = *x.shape[:2], golden["heads"]
    positions = torch.arange(length).expand(rows, -1)
    queries, keys = (
        _rotated((x @ golden[name]).view(rows, length, heads, -1).transpose(1, 2), positions) for name in ("wq", "wk")
    )
    source = positions.masked_fill(~there, -1)
    visual = torch.stack(
        [
            (positions[0] >= start) & (positions[0] < start + count)
            for start, count in zip(golden["image_pos"].tolist(), golden["image_tokens"].tolist(), strict=True)
        ]
    )
    last = golden["prompt_len"] + golden["image_tokens"] - 1
    raw = EnteredAttention(
        queries,
        keys,
        keys,
        queries.shape[-1] ** -0.5,
        kernels.VisibilityMask(source, source),
        length,
        there,
        there & ~visual,
        visual,
        last,
    )
    values = EnteringAttention().compute(raw)
    ratio = golden["ratios"][golden["stage"] + 1].item()
    selector = get_selector("pyramiddrop").resolve(ModelShape(32), ratio)
    for row in range(rows):
        n = int(golden["image_tokens"][row])
        context = VisualContext(
            torch.zeros(n, 1),
            n,
            torch.Generator(),
            ((1, 1, n),),
            site=DecoderLayer(8),
            keep_ratio=ratio,
            tokens_at_input=n,
            signals={EnteringAttention(): EnteringAttention().present(values[row][visual[row]])},
        )
        kept = selector.select(context.check()).keep + golden["image_pos"][row]
        theirs = golden["kept_positions"][row]
        assert torch.equal(kept, theirs[(theirs >= 0) & visual[row][theirs.clamp(min=0)]])


def test_pyramiddrop_keeps_the_papers_shares() -> None:
    selector = get_selector("pyramiddrop").resolve(ModelShape(32), 0.125)
    assert selector.layers == (8, 16, 24)
    assert [stage.keep for stage in selector.stages(ModelShape(32), 0.125)] == [0.5] * 3
    with pytest.raises(ConfigError, match="give keep_ratio, not keep_tokens"):
        selector.stages(ModelShape(32), None)
