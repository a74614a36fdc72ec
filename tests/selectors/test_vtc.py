"""The library's own method against its equations, and what it does at places where it cannot merge."""

from __future__ import annotations

import pytest
import torch

import vtc
from tests import tiny
from tests.kernels import near_ties
from tests.selectors.inputs import make_context
from vtc import kernels
from vtc.core.actions import Action
from vtc.core.observations import TokenGrids
from vtc.core.signals import ClsAttention
from vtc.core.sites import BeforeDecoder, DecoderLayer, Pixels, VisionLayer
from vtc.core.stage import ModelShape
from vtc.functional import select
from vtc.registry import get_selector
from vtc.selectors import VtcSelector
from vtc.selectors.vtc import Place

CLIP = ModelShape(32, 24, 22, cls=True)


def drawn(n: int = 48, d: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, d, generator=generator)
    return centres[torch.randint(6, (n,), generator=generator)] + 0.4 * torch.randn(n, d, generator=generator)


def places_of(t: int, h: int, w: int) -> torch.Tensor:
    return torch.tensor([[a / t, b / h, c / w] for a in range(t) for b in range(h) for c in range(w)])


@pytest.mark.parametrize(
    ("grid", "k", "width"),
    [
        ((1, 6, 8), 9, 0.5),
        ((1, 6, 8), 24, 0.5),
        ((3, 4, 4), 6, 0.25),
        ((3, 4, 4), 9, 0.25 / 1.5),
        ((3, 4, 4), 12, 0.125),
    ],
)
def test_choice_and_merging_are_the_equations(grid: tuple[int, int, int], k: int, width: float) -> None:
    x = drawn()
    attention = torch.rand(2, 3, 48, generator=torch.Generator().manual_seed(5))
    scores = attention.mean(dim=1).sum(dim=0)
    quality = torch.ones(48)
    if grid[0] == 1:
        quality = torch.tensor([(scores <= s).sum().item() / 48 for s in scores]) ** 0.25
    selection = select("vtc", features=x, cls_attention=attention, grid_thw=grid, keep_tokens=k)
    places = places_of(*grid) / width
    order = kernels.dpp_greedy(x, k, quality, places, 1e-4)
    near_ties.assert_greedy(order, x, k, near_ties.volume(quality, places, 1e-4), 1e-5)
    assert selection.keep.tolist() == sorted(order.tolist())

    merged = selection.merge(x)
    for slot, token in enumerate(selection.keep.tolist()):
        dropped = [i for i in range(48) if not selection.mask[i]]
        cosine = torch.cosine_similarity(x[:, None], x[selection.keep][None], dim=2)
        followers = [i for i in dropped if int(cosine[i].argmax()) == slot]
        expected = (x[token] + 0.5 * x[followers].sum(dim=0)) / (1 + 0.5 * len(followers))
        torch.testing.assert_close(merged[slot], expected)


def test_it_is_not_random_and_its_options_count() -> None:
    arguments = {"features": drawn(), "grid_thw": (1, 6, 8), "keep_tokens": 12}
    kept = select("vtc", **arguments).keep.tolist()
    assert kept != select("random", **arguments).keep.tolist()
    assert kept != select("vtc", **arguments, width=0.05).keep.tolist()
    plain = select("vtc", **arguments, merge_weight=0)
    assert plain.keep.tolist() == kept
    assert plain.assign is None
    attention = torch.linspace(1, 2, 48).view(1, 1, -1)
    for ignored in ({"quality": "none"}, {"exponent": 0}):
        assert select("vtc", **arguments, cls_attention=attention, **ignored).keep.tolist() == kept
    assert select("vtc", **arguments, cls_attention=attention).keep.tolist() != kept
    equal = torch.ones(1, 1, 48)
    assert select("vtc", **arguments, cls_attention=equal).keep.tolist() == kept, "as if there were no [CLS]"
    with pytest.raises(vtc.ConfigError, match="needs cls_attention"):
        select("vtc", **arguments, quality="cls")
    for wrong in ({"width": 0}, {"exponent": -1}, {"merge_weight": -1}, {"quality": "received"}):
        with pytest.raises(vtc.ConfigError, match=f"vtc: {next(iter(wrong))} must be"):
            VtcSelector(**wrong)


def test_many_tokens_of_a_video_are_spread_over_time() -> None:
    # One picture, standing still: what is kept of it says nothing but where it was kept.
    x = drawn(64, 16)[:16].repeat(8, 1)
    frames = select("vtc", features=x, grid_thw=(8, 4, 4), keep_tokens=32).keep // 16
    wide = select("vtc", features=x, grid_thw=(8, 4, 4), keep_tokens=32, width=0.25).keep // 16
    counts, before = (torch.bincount(each, minlength=8) for each in (frames, wide))
    assert counts.max() - counts.min() < before.max() - before.min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beyond_the_rank_picks_are_distinct(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).repeat(16, 1).to(dtype)
    x[5::7] = 0
    for k in (3, 20, 47):
        for grid in ((1, 6, 8), (1, 1, 48)):
            selection = select("vtc", features=x, grid_thw=grid, keep_tokens=k)
            assert selection.k == k
            assert bool(selection.merge(x).isfinite().all())


def test_places() -> None:
    assert Place().compute(TokenGrids(((1, 1, 9),))).abs().max() == 0, "no known shape"
    video = Place().compute(TokenGrids(((4, 2, 5),)))
    assert video[-1].tolist() == pytest.approx([3 / 4, 1 / 2, 4 / 5])
    thumbnail, whole = Place().compute(TokenGrids(((1, 2, 2), (1, 4, 6)))).split([4, 24])
    assert thumbnail[3].tolist() == whole[2 * 6 + 3].tolist() == [0, 0.5, 0.5]
    tiles = Place().compute(TokenGrids(((1, 2, 2),) * 7)).view(7, 4, 3)
    assert tiles[:, 0, 1:].tolist() == [
        pytest.approx(place)
        for place in ([0, 0], [0, 1 / 3], [0, 2 / 3], [1 / 2, 0], [1 / 2, 1 / 3], [1 / 2, 2 / 3], [0, 0])
    ]
    assert tiles[6, 3].tolist() == [0, 0.5, 0.5]


def test_stages() -> None:
    (stage,) = VtcSelector().stages(CLIP)
    assert stage.action is Action.MERGE
    layers = tuple(range(16, 23))
    assert stage.requires == (Place(), ClsAttention(layers, modalities=("image",)))
    assert VtcSelector().stages(ModelShape(32, 24, 22))[0].requires == (Place(),)
    assert VtcSelector(merge_weight=0).stages(CLIP)[0].action is Action.KEEP
    moved = {site: VtcSelector().moved(stage, site) for site in (Pixels(), VisionLayer(0), VisionLayer(3))}
    assert [len(stage.requires) for stage in moved.values()] == [1, 1, 2]
    assert {stage.action for stage in moved.values()} == {Action.KEEP}
    for site in (Pixels(), VisionLayer(0)):
        with pytest.raises(vtc.ConfigError, match="no layer has run at"):
            VtcSelector(quality="cls").moved(stage, site)
    assert VtcSelector().moved(stage, BeforeDecoder()) == stage
    inside = VtcSelector().moved(stage, DecoderLayer(2))
    assert inside.requires == stage.requires
    assert inside.action is Action.KEEP
    context = make_context(get_selector("vtc"), 9)
    context.site = DecoderLayer(2)
    assert VtcSelector().select(context).assign is None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("at", ["pixels", "vision:0", "vision:1", "decoder", "decoder:2"])
def test_in_models_at_every_place(family: str, at: str) -> None:
    case = tiny.build(family)
    with vtc.compressed(case.model, "vtc", keep_ratio=0.5, at=at), torch.no_grad():
        output = case.model(**case.batch("single"))
        (segment,) = vtc.report(case.model).segments
    assert segment.tokens_after == round(segment.tokens_before / 2)
    assert bool(output.logits.isfinite().all())
