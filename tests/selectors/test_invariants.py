"""Invariants of every registered method; registering a method puts it through all of them."""

from __future__ import annotations

import pytest
import torch

from tests.selectors.inputs import SELECTING, make_context, replace_floats
from vtc.core.selection import Selection
from vtc.core.signals import HiddenStates, VisionKeys
from vtc.core.sites import Site
from vtc.core.stage import ModelShape
from vtc.registry import get_selector, selectors
from vtc.selectors import ScoreSelector, Selector

GRIDS = {
    "image": ((1, 6, 6),),
    "wide image": ((1, 3, 11),),
    "video": ((5, 3, 4),),
    "tiles": ((1, 4, 4), (1, 2, 5), (1, 1, 3)),
    "one token": ((1, 1, 1),),
}
CLIP_VICUNA = ModelShape(decoder_layers=32, vision_layers=24, feature_layer=22)


def assert_budget(selector: Selector, selection: Selection, budget: int = 9) -> None:
    """The budget is met, or by methods that count for themselves not exceeded."""
    assert selection.k == budget or (selector.adaptive and 1 <= selection.k < budget)


@pytest.mark.parametrize("method", SELECTING)
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_keeps_exactly_the_budget(method: str, grids: tuple[tuple[int, int, int], ...]) -> None:
    selector = get_selector(method)
    n = make_context(selector, 1, grids).n
    for budget in sorted({1, 2, n // 3, n // 2, n - 1, n, n + 7} - {0}):
        selection = selector.select(make_context(selector, budget, grids))
        assert selection.n == n
        assert_budget(selector, selection, min(budget, n))  # ascending and distinct is what Selection itself checks


@pytest.mark.parametrize("method", SELECTING)
def test_same_seed_same_selection(method: str) -> None:
    selector = get_selector(method)
    one, two = (selector.select(make_context(selector, 9)) for _ in range(2))
    assert one.to_dict() == two.to_dict()


@pytest.mark.parametrize("method", SELECTING)
def test_no_side_effects(method: str) -> None:
    selector = get_selector(method)
    context = make_context(selector, 9)
    values = {"features": context.features, **{signal.name: value for signal, value in context.signals.items()}}
    before = {name: value.clone() for name, value in values.items()}
    state = torch.get_rng_state()
    selector.select(context)
    assert torch.equal(torch.get_rng_state(), state), "a selector draws from ctx.generator only"
    for name, value in before.items():
        assert torch.equal(values[name], value), f"{name} was modified"


@pytest.mark.parametrize("method", SELECTING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(method: str, dtype: torch.dtype) -> None:
    selector = get_selector(method)
    half = make_context(selector, 9, dtype=dtype)
    wide = replace_floats(make_context(selector, 9, dtype=dtype), torch.Tensor.float)
    assert torch.equal(selector.select(half).keep, selector.select(wide).keep)
    if isinstance(selector, ScoreSelector):
        assert torch.equal(selector.score(half), selector.score(wide))


@pytest.mark.parametrize("method", SELECTING)
def test_large_half_precision_features_stay_finite(method: str) -> None:
    selector = get_selector(method)
    context = make_context(selector, 9, dtype=torch.float16)
    context.features = 6e4 * context.features.sign()
    large = {s: 6e4 * x.sign() for s, x in context.signals.items() if isinstance(s, (VisionKeys, HiddenStates))}
    assert len(large) == 2
    context.signals = {**context.signals, **large}
    assert_budget(selector, selector.select(context.check()))


@pytest.mark.parametrize("method", SELECTING)
def test_equal_tokens_are_legal(method: str) -> None:
    selector = get_selector(method)
    context = replace_floats(make_context(selector, 9), torch.ones_like)
    assert_budget(selector, selector.select(context))


@pytest.mark.parametrize("method", SELECTING)
def test_zero_tokens_are_legal(method: str) -> None:
    selector = get_selector(method)
    context = replace_floats(make_context(selector, 9), torch.zeros_like)
    assert_budget(selector, selector.select(context))


@pytest.mark.parametrize("method", [m for m in SELECTING if issubclass(selectors()[m], ScoreSelector)])
def test_kept_are_the_best_under_the_own_score(method: str) -> None:
    selector = get_selector(method)
    assert isinstance(selector, ScoreSelector)
    for seed in range(5):
        context = make_context(selector, 9, seed=seed)
        scores, mask = selector.score(context), selector.select(context).mask
        assert scores.dtype == torch.float32
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("method", sorted(selectors()))
def test_metadata(method: str) -> None:
    if method == "kvpress":  # which is another package's
        pytest.importorskip("kvpress")
    cls = selectors()[method]
    assert cls.name == method
    assert cls.paper
    assert cls.__name__.endswith("Selector")
    assert (cls.__doc__ or "").strip()
    stages = cls().resolve(CLIP_VICUNA, 0.5).stages(CLIP_VICUNA, 0.5)
    orders = [stage.site.order for stage in stages]
    assert all(isinstance(stage.site, Site) for stage in stages)
    assert orders == sorted(set(orders)), "in the order in which tokens get there"
    layers = [signal.vision_layers(24, 22) for stage in stages for signal in stage.requires]
    assert all(set(read) <= set(range(24)) for read in layers)
    assert cls() == get_selector(method)
    assert hash(cls()) == hash(get_selector(method))
