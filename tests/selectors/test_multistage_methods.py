"""ToDRE, ATP, AIM and VFlowOpt, which work at several sites, beyond their golden vectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc import kernels
from vtc.core.context import VisualContext
from vtc.core.grids import Grid, grid_coords
from vtc.core.observations import TokenGrids
from vtc.core.ranges import Float
from vtc.core.selection import Selection
from vtc.core.signals import ClsAttention, Origin, VisionKeys
from vtc.core.sites import BeforeDecoder, DecoderLayer, Site
from vtc.core.stage import ModelShape, Stage
from vtc.errors import ConfigError
from vtc.functional import select
from vtc.registry import get_selector
from vtc.selectors import AimSelector, AtpSelector, VFlowOptSelector
from vtc.selectors.aim import retained
from vtc.selectors.learned.atp import ModalityAttention, redundancy_score, soft_mask, spatial_score
from vtc.selectors.schedule import at_depth, average_kept, stretches
from vtc.selectors.todre import AttentionExchange
from vtc.selectors.vflowopt import PRESETS, ContextRelevance, PixelEntropy


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sites(stages: tuple[Stage, ...]) -> list[Site]:
    return [stage.site for stage in stages]


def shares(n: int, seed: int = 0) -> torch.Tensor:
    return draw(n, seed=seed).softmax(0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("todre", {"pivot": "cLs"}),
        ("todre", {"diversity": "max"}),
        ("todre", {"tau": 1.5}),
        ("todre", {"tau": "0.1"}),
        ("todre", {"exit_layer": 0}),
        ("todre", {"text": "before"}),
        ("aim", {"metric": "cls"}),
        ("aim", {"l1": 8, "l2": 8}),
        ("aim", {"l1": -1}),
        ("aim", {"iterations": 2.5}),
        ("aim", {"temperature": 0}),
        ("aim", {"damping": math.nan}),
        ("aim", {"prune": 1}),
        ("vflowopt", {"variant": "both"}),
        ("vflowopt", {"r2": 1.1}),
        ("vflowopt", {"cell": 0.5}),
        ("vflowopt", {"t": -1}),
        ("vflowopt", {"alpha": math.inf}),
        ("vflowopt", {"layers": (9, 9)}),
        ("vflowopt", {"layers": (0, 9)}),
        ("vflowopt", {"std": (0.5, "a")}),
        ("vflowopt", {"recycle": "no"}),
        ("vflowopt", {"recycle": 1}),
        ("atp", {"theta_r": 2}),
        ("atp", {"theta_s": (0.1, -0.1)}),
        ("atp", {"stride": 0}),
        ("atp", {"layers": (4, 4)}),
        ("atp", {"layers": ()}),
        ("atp", {"scale": "max"}),
        ("atp", {"self_score": "sent"}),
        ("atp", {"self_score": "logits"}),
    ],
)
def test_invalid_options_are_named(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{method}: {next(iter(options))}"):
        get_selector(method, **options)


# --- schedules -------------------------------------------------------------------------------------------------------


def test_schedule_arithmetic() -> None:
    assert stretches((9, 18), 28) == [9, 9, 10]
    assert average_kept((0.5, 0.5, 0.5), (1, 1, 2)) == pytest.approx((0.5 + 0.25 + 2 * 0.125) / 4)
    assert [at_depth(layer, 32, 28) for layer in (5, 15, 25)] == [4, 13, 22]


# --- vflowopt --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(4, 96), st.floats(0.02, 1.0))
def test_vflowopt_stages_average_to_any_budget(depth: int, keep_ratio: float) -> None:
    stages = VFlowOptSelector().resolve(ModelShape(depth), keep_ratio).stages(ModelShape(depth), keep_ratio)
    layers = [stage.site.layer for stage in stages if isinstance(stage.site, DecoderLayer)]
    assert all(stage.keep is not None and 0 < stage.keep <= 1 for stage in stages)
    average = average_kept([stage.keep or 0.0 for stage in stages], stretches(layers, depth))
    assert average == pytest.approx(keep_ratio, abs=1e-6)


def test_vflowopt_searches_within_the_authors_bounds() -> None:
    space = VFlowOptSelector.search_space(28, 0.25)
    bounds = {name: (found.low, found.high) for name, found in space.items() if isinstance(found, Float)}
    r2 = (pytest.approx(0.2 / 0.375), 1.0)
    assert bounds == {"t": (0, 50), "cell": (3, 24), "alpha": (-1, 1), "r1": (0.25, 0.375), "r2": r2}


def test_vflowopt_impossible_budgets_are_refused() -> None:
    for options in ({"r1": 0.1}, {"r1": 1.0, "r2": 1.0}, {"r1": 0.9, "r2": 0.9, "r3": 0.9}, {"r1": 0.0}):
        with pytest.raises(ConfigError, match=r"do not keep 0\.5 of the tokens on average over 9 \+ 9 \+ 10 layers"):
            VFlowOptSelector(**options).resolve(ModelShape(28), 0.5)
    with pytest.raises(ConfigError, match="needs keep_ratio, not keep_tokens"):
        VFlowOptSelector().resolve(ModelShape(28), None)
    with pytest.raises(ConfigError, match=r"layers=\(9, 28\), but the decoder has layers 0 to 27"):
        VFlowOptSelector(layers=(9, 28)).resolve(ModelShape(28), 0.5)


def test_vflowopt_keeping_everything_is_one_stage() -> None:
    (stage,) = VFlowOptSelector().resolve(ModelShape(28), 1.0).stages(ModelShape(28), 1.0)
    assert (stage.site, stage.keep) == (BeforeDecoder(), 1.0)


def test_vflowopt_entropy_is_asked_for_only_if_it_counts() -> None:
    (relevance,) = VFlowOptSelector().stages()[0].requires
    assert relevance == ContextRelevance(t=PRESETS[0.25].t, reduction="sum")
    pixels = {"mean": (0.4, 0.5, 0.6), "std": 0.25}
    assert VFlowOptSelector(alpha=-0.1, **pixels).stages()[0].requires == (relevance, PixelEntropy(**pixels))
    assert VFlowOptSelector(variant="released", t=3).stages()[0].requires == (ContextRelevance(t=3, reduction="mean"),)
    for vision_layer, layers in ((None, (22,)), (3, (3,))):
        stages = VFlowOptSelector(vision_layer=vision_layer).stages(ModelShape(28, 24, 22), 0.5)
        assert all(signal.vision_layers(24, 22) == layers for stage in stages for signal in stage.requires)
    with pytest.raises(ConfigError, match="vision_layer=24, but the tower has layers 0 to 23"):
        VFlowOptSelector(vision_layer=24).stages(ModelShape(28, 24, 22), 0.5)


def recycled(scores: torch.Tensor, grids: tuple[Grid, ...], budget: int, cell: float, **options: Any) -> Selection:
    return select("vflowopt", context_relevance=scores, grid_thw=list(grids), keep_tokens=budget, cell=cell, **options)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(1.0, 6.0), st.data())
def test_vflowopt_recycling_keeps_the_budget_and_the_mass(h: int, w: int, cell: float, data: Any) -> None:
    grids: tuple[Grid, ...] = ((1, h, w), (1, 3, 4))
    n = h * w + 12
    scores = shares(n, seed=data.draw(st.integers(0, 99)))
    budget = data.draw(st.integers(1, n))
    selection = recycled(scores, grids, budget, cell)
    assert selection.k == budget
    if selection.assign is None:
        assert torch.equal(selection.keep, kernels.topk_indices(scores, budget))
        return
    assert bool((selection.assign >= 0).all()), "every token that is not kept goes on in its cell"
    assert selection.weight is not None
    mass = torch.zeros(budget).index_add_(0, selection.assign, selection.weight)
    torch.testing.assert_close(mass, torch.ones(budget))
    coords = grid_coords(grids)
    place = torch.stack([coords[:, 0], (coords[:, 2] / cell).floor().long(), (coords[:, 3] / cell).floor().long()], 1)
    anchor = selection.keep[selection.assign]
    assert torch.equal(place[anchor], place), "a token is recycled within its cell"
    assert bool((scores[anchor] >= scores).all()), "the best of a cell stands for it"


def test_vflowopt_weights_are_shares_of_importance() -> None:
    scores = torch.tensor([0.4, 0.1, 0.3, 0.2])
    selection = recycled(scores, ((1, 2, 2),), 1, 4.0)
    assert selection.keep.tolist() == [0]
    torch.testing.assert_close(selection.weight, scores)
    even = recycled(torch.zeros(4), ((1, 2, 2),), 1, 4.0)
    assert even.weight is not None
    assert even.weight.tolist() == [0.25] * 4, "a cell of no importance is averaged"


def test_vflowopt_does_not_merge_videos_or_without_recycling() -> None:
    scores = shares(16)
    best = kernels.topk_indices(scores, 6)
    for grids, options in ((((4, 2, 2),), {}), (((1, 4, 4),), {"recycle": False})):
        selection = recycled(scores, grids, 6, 2.0, **options)
        assert selection.assign is None
        assert torch.equal(selection.keep, best)


def test_vflowopt_leaves_several_images_unmerged() -> None:
    scores = shares(16)
    best = kernels.topk_indices(scores, 6).sort().values
    alone, together, forced = (
        recycled(scores, ((1, 4, 4),), 6, 2.0, **options)
        for options in ({}, {"other_visuals": 1}, {"other_visuals": 1, "recycle": True})
    )
    assert together.assign is None
    assert torch.equal(together.keep, best)
    assert alone.assign is not None
    assert forced.assign is not None
    # 16 + 2 newlines: alone 18 are counted, beside another image 16.
    ratio = {"keep_ratio": 0.3, "variant": "released", "recycle": False, "structural": 2}
    counts = [
        select("vflowopt", context_relevance=scores, grid_thw=(1, 4, 4), other_visuals=other_visuals, **ratio).k
        for other_visuals in (0, 1)
    ]
    assert counts == [16 - round(18 * 0.7), 16 - round(16 * 0.7)]


def test_vflowopt_variants_round_differently() -> None:
    # Newlines count in the released budget, though they always stay.
    counts = {}
    for structural in (0, 1, 3):
        for variant in ("paper", "released"):
            selection = select(
                "vflowopt",
                context_relevance=shares(10),
                grid_thw=(2, 1, 5),
                keep_ratio=0.25,
                structural=structural,
                variant=variant,
            )
            counts[structural, variant] = selection.k
    assert [counts[s, "paper"] for s in (0, 1, 3)] == [2, 2, 2]
    assert [counts[s, "released"] for s in (0, 1, 3)] == [2, 2, 1], "10 - round((10 + s) * 0.75), at least one"


# --- aim -------------------------------------------------------------------------------------------------------------


def merge_by_hand(metric: torch.Tensor, r: int) -> list[set[int]]:
    """Slots of one round as sets of tokens, in the authors' order, from the definition in float64."""
    unit = metric.double() / metric.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    sources, targets = range(0, len(metric), 2), range(1, len(metric), 2)
    best = {i: max(targets, key=lambda j: (float(unit[i] @ unit[j]), -j)) for i in sources}
    ranked = sorted(sources, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))
    slots = {j: {j} for j in targets}
    for i in ranked[:r]:
        slots[best[i]].add(i)
    return [{i} for i in ranked[r:]] + list(slots.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(1, 12), st.integers(0, 99))
def test_merge_is_the_definition(n: int, r: int, seed: int) -> None:
    metric = draw(1, n, 5, seed=seed)
    r = min(r, n // 2)
    anchors, assign = kernels.bipartite_merge(metric, r, order="author")
    slots = [set((assign[0] == slot).nonzero()[:, 0].tolist()) for slot in range(n - r)]
    assert slots == merge_by_hand(metric[0], r)
    assert all(int(anchor) in slot for anchor, slot in zip(anchors[0], slots, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.data())
def test_aim_merges_every_frame_by_itself_to_exactly_the_budget(frames: int, size: int, data: Any) -> None:
    budget = data.draw(st.integers(1, frames * size))
    x = draw(frames * size, 6, seed=size)
    selection = select("aim", features=x, grid_thw=(frames, 1, size), keep_tokens=budget, metric="features")
    assert selection.k == budget
    per_frame = torch.bincount(selection.keep // size, minlength=frames)
    assert int(per_frame.max()) - int(per_frame.min()) <= 1
    if selection.assign is None:
        return
    member = selection.assign >= 0
    assert torch.equal((selection.keep[selection.assign[member]]) // size, torch.arange(frames * size)[member] // size)
    assert bool((per_frame[torch.arange(frames * size)[~member] // size] == 0).all()), "only frames without a share go"
    assert selection.weight is not None
    mass = torch.zeros(budget).index_add_(0, selection.assign[member], selection.weight[member])
    torch.testing.assert_close(mass, torch.ones(budget))


def test_aim_halves_until_the_budget_and_keeps_means_of_means() -> None:
    # Eight tokens to two: two rounds. Sizes of earlier merges are not tracked: every round averages plainly.
    x = draw(8, 4, seed=3)
    selection = select("aim", features=x, keep_tokens=2, metric="features")
    first_anchors, first = kernels.bipartite_merge(x[None], 4, order="author")
    once = torch.stack([x[first[0] == slot].mean(0) for slot in range(4)])
    _, second = kernels.bipartite_merge(once[None], 2, order="author")
    twice = torch.stack([once[second[0] == slot].mean(0) for slot in range(2)])
    torch.testing.assert_close(selection.merge(x).sort(dim=0).values, twice.sort(dim=0).values)
    assert first_anchors.shape == (1, 4)


def test_aim_compares_images_by_keys_and_frames_by_themselves() -> None:
    x, keys = draw(8, 4, seed=1), draw(8, 3, seed=2)
    for grid, metric, inputs in (
        ((1, 2, 4), "keys", {"features": x, "keys": keys}),
        ((2, 1, 4), "features", {"features": x}),
    ):
        released = select("aim", grid_thw=grid, keep_tokens=4, **inputs)
        named = select("aim", grid_thw=grid, keep_tokens=4, metric=metric, **inputs)
        assert torch.equal(released.assign, named.assign)
    assert not torch.equal(
        select("aim", features=x, keys=keys, grid_thw=(1, 2, 4), keep_tokens=4).assign,
        select("aim", features=x, grid_thw=(1, 2, 4), keep_tokens=4, metric="features").assign,
    )
    with pytest.raises(ConfigError, match="aim needs keys; got features"):
        select("aim", features=x, keep_tokens=4)


def test_aim_schedules() -> None:
    assert [retained(98, rate / 8) for rate in range(8, -1, -1)] == [98, 85, 73, 61, 49, 36, 24, 12, 0]
    assert retained(10, 1 - 7 / 10) == 3, "0.3 * 10 falls short of 3 in its last bits only"
    for depth, layers in ((28, (14, 22)), (32, (13, 21)), (36, (18, 28)), (4, (2, 3)), (2, (1, 2))):
        selector = AimSelector().resolve(ModelShape(depth), 0.25)
        assert (selector.l1, selector.l2) == layers
    assert AimSelector(l1=20).resolve(ModelShape(28), 0.25).l2 == 22
    assert AimSelector(l1=25).resolve(ModelShape(28), 0.25).l2 == 26
    inside = [DecoderLayer(layer) for layer in range(22, 28)]
    assert sites(AimSelector(l1=21, l2=29).stages(ModelShape(28), 0.25)) == [BeforeDecoder(), *inside]
    assert (
        AimSelector().stages(ModelShape(28), 1.0)
        == AimSelector(prune=False).stages(ModelShape(28), 0.25)
        == AimSelector().stages()
    )
    with pytest.raises(ConfigError, match="give l1 and l2"):
        AimSelector().rate(14)


def test_aim_keys_come_from_the_layer_that_reads_the_features() -> None:
    def layers(depth: int, feature_layer: int, **options: Any) -> list[tuple[int, ...]]:
        stage = AimSelector(**options).stages(ModelShape(32, depth, feature_layer), 0.25)[0]
        assert all(isinstance(signal, VisionKeys) for signal in stage.requires)
        return [signal.vision_layers(depth, feature_layer) for signal in stage.requires]

    assert layers(24, 22, metric="keys") == [(23,)]
    assert layers(26, 25, metric="keys") == [(25,)]
    assert layers(24, 22, metric="keys", key_layer=3) == [(3,)]
    assert layers(24, 22, metric="features") == []
    with pytest.raises(ConfigError, match="key_layer=24, but the tower has layers 0 to 23"):
        layers(24, 22, metric="keys", key_layer=24)
    for metric, modalities in (("released", ("image",)), ("keys", ("image", "video"))):
        (signal,) = AimSelector(metric=metric).stages()[0].requires
        assert [signal.wanted_of(modality) for modality in ("image", "video")] == [True, len(modalities) == 2]


# --- todre -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_max_sum_is_the_definition(n: int, k: int, seed: int) -> None:
    x = draw(n, 4, seed=seed)
    first = seed % n
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    picks = [first]
    while len(picks) < min(k, n):
        rest = [i for i in range(n) if i not in picks]
        picks.append(min(rest, key=lambda i: float(unit[i] @ unit[picks].sum(0))))
    assert kernels.max_sum(x, k, first).tolist() == picks


def todre_pivot(grids: tuple[Grid, ...], seed: int = 0, **options: Any) -> int:
    """The single token that is kept at a budget of one."""
    n = sum(math.prod(grid) for grid in grids)
    rows = torch.arange(n).float().expand(1, 2, -1)
    given = {"cls": {"cls_attention": rows}, "received": {"received_attention": rows}}.get(
        options.get("pivot", "cls"), {}
    )
    selection = select("todre", features=draw(n, 4), grid_thw=list(grids), keep_tokens=1, seed=seed, **given, **options)
    return int(selection.keep)


def test_todre_pivots() -> None:
    assert todre_pivot(((1, 4, 4),)) == 15
    assert todre_pivot(((1, 4, 4),), pivot="received") == 15
    assert todre_pivot(((1, 4, 4), (1, 8, 8))) == 15, "in the thumbnail"
    assert todre_pivot(((1, 4, 4), (1, 4, 4), (1, 4, 4))) == 47, "equal tiles have no thumbnail that is known"
    assert todre_pivot(((3, 4, 4),)) == 47, "the best of all frames"
    assert todre_pivot(((3, 5, 5),), pivot="center") == 25 + 12
    drawn = {todre_pivot(((1, 4, 4), (1, 8, 8)), seed=seed, pivot="random") for seed in range(20)}
    assert len(drawn) > 1
    assert max(drawn) < 16
    assert todre_pivot(((1, 4, 4),), seed=3, pivot="random") == todre_pivot(((1, 4, 4),), seed=3, pivot="random")


def test_todre_stages() -> None:
    for depth, layer in ((32, 28), (28, 24)):
        stages = get_selector("todre").stages(ModelShape(depth), 0.1)
        assert sites(stages) == [BeforeDecoder(), DecoderLayer(layer)]
        assert stages[1].requires == (AttentionExchange(),)
    for stages in (
        get_selector("todre").stages(ModelShape(32), 1.0),
        get_selector("todre", tau=0).stages(ModelShape(32), 0.1),
    ):
        assert sites(stages) == [BeforeDecoder()]
    (signal,) = get_selector("todre").stages()[0].requires
    assert isinstance(signal, ClsAttention)
    assert signal.vision_layers(24, 22) == (23,)
    assert get_selector("todre", pivot="center").stages()[0].requires == ()


@pytest.mark.parametrize(("exchange", "left"), [((0.05, 0.0), 0), ((0.05, 0.2), 6), ((0.1, 0.0), 6), ((0.3, 0.3), 6)])
def test_todre_leaves_only_if_both_ratios_are_low(exchange: tuple[float, float], left: int) -> None:
    context = VisualContext(
        features=torch.empty(6, 0),
        budget=6,
        generator=torch.Generator(),
        grids=((1, 2, 3),),
        site=DecoderLayer(28),
        signals={AttentionExchange(): torch.tensor(exchange)},
    )
    assert get_selector("todre").select(context).k == left


# --- atp -------------------------------------------------------------------------------------------------------------


def atp(scores: torch.Tensor, grid: Grid, budget: int | None = None, **options: Any) -> Selection:
    """A selection where text and vision give the same `scores`."""
    return select(
        "atp", modality_attention=scores.expand(2, -1), grid_thw=grid, keep_tokens=budget or len(scores), **options
    )


def test_atp_keeps_what_is_above_either_threshold() -> None:
    scores = torch.tensor([0.01, 0.4, 0.01, 0.3, 0.01, 0.2, 0.01, 0.05, 0.01])
    assert atp(scores, (1, 3, 3), theta_r=0.25, theta_s=1.0, scale="none").keep.tolist() == [1, 3]
    assert atp(scores, (1, 3, 3), theta_r=0.25, theta_s=0.2, scale="none").keep.tolist() == [0, 1, 2, 3, 6, 8]
    assert atp(scores, (1, 3, 3), theta_r=0.25, theta_s=0.25, scale="none").keep.tolist() == [1, 3], "not above"
    assert atp(scores, (1, 3, 3), theta_r=1.0, theta_s=1.0, scale="none").keep.tolist() == [1], "never none"
    assert atp(scores, (1, 3, 3), budget=1, theta_r=0.15, theta_s=1.0, scale="none").keep.tolist() == [1]


def test_atp_relative_scale_adapts_to_the_picture() -> None:
    assert redundancy_score(torch.ones(4), torch.ones(4), "relative").tolist() == [0.5] * 4
    assert redundancy_score(torch.zeros(4), torch.zeros(4), "relative").tolist() == [0.0] * 4
    small = redundancy_score(*draw(2, 9).softmax(-1), "relative")
    torch.testing.assert_close(redundancy_score(*draw(2, 9).softmax(-1) / 100, "relative"), small)
    # Attention on one thing keeps few, attention spread over many keeps many, at the same thresholds.
    plain, cluttered = torch.full((36,), 0.01), torch.full((36,), 0.01)
    plain[:3], cluttered[:15] = 0.2, 0.04
    kept = [atp(scores, (1, 6, 6), theta_s=1.0).k for scores in (plain, cluttered)]
    assert kept == [3, 15]


def test_atp_layers_by_depth_and_their_own_thresholds() -> None:
    assert AtpSelector().resolve(ModelShape(32), 0.5).layers == (4, 14, 24)
    assert AtpSelector().resolve(ModelShape(28), 0.5).layers == (3, 12, 21)
    assert AtpSelector().resolve(ModelShape(4), 0.5).layers == (0, 1, 2)
    stages = AtpSelector().stages(ModelShape(32), 0.5)
    assert sites(stages) == [DecoderLayer(5), DecoderLayer(15), DecoderLayer(25)]
    assert [stage.keep for stage in stages] == [None, 1.0, 1.0]
    assert AtpSelector().stages(ModelShape(32), 1.0) == ()
    with pytest.raises(ConfigError, match="theta_r has 2 values for the 3 layers"):
        AtpSelector(theta_r=(0.1, 0.2)).resolve(ModelShape(32), 0.5)
    selector = AtpSelector(theta_r=(0.0, 0.5, 1.0), theta_s=1.0).resolve(ModelShape(32), 0.5)
    counts = []
    for layer in (5, 15, 25):
        scores = torch.tensor([0.1, 0.2, 0.3, 0.4])
        context = VisualContext(
            features=torch.empty(4, 0),
            budget=4,
            generator=torch.Generator(),
            grids=((1, 2, 2),),
            site=DecoderLayer(layer),
            signals={ModalityAttention(): scores.expand(2, -1), Origin(): TokenGrids(((1, 2, 2),)).origin()},
        )
        counts.append(selector.select(context).k)
    assert counts == [4, 2, 1]
    with pytest.raises(ConfigError, match=r"behind decoder layers \(4, 14, 24\), asked at decoder:6"):
        selector.select(VisualContext(torch.empty(1, 0), 1, torch.Generator(), ((1, 1, 1),), site=DecoderLayer(6)))


def test_atp_soft_mask_is_hard_at_one_half() -> None:
    redundancy, spatial = draw(3, 9).sigmoid(), spatial_score(TokenGrids(((1, 3, 3),)).origin(), 2)
    theta_r, theta_s = torch.tensor([0.3, 0.5, 0.7]), torch.tensor([0.1, 0.5, 0.9])
    hard = (redundancy > theta_r[:, None]) | (spatial > theta_s[:, None])
    for temperature in (10.0, 100.0):
        assert torch.equal(soft_mask(redundancy, spatial, theta_r, theta_s, temperature) > 0.5, hard)
