"""What holds for every registered method: a new one is put through all of this by registering."""

from __future__ import annotations

import pytest
import torch

from tests.selectors.inputs import FLOATS, make_context
from vtc.core.selection import Selection
from vtc.registry import get_selector, selectors
from vtc.selectors import ScoreSelector, Selector

METHODS = sorted(selectors())
GRIDS = {
    "image": ((1, 6, 6),),
    "wide image": ((1, 3, 11),),
    "video": ((5, 3, 4),),
    "tiles": ((1, 4, 4), (1, 2, 5), (1, 1, 3)),
    "one token": ((1, 1, 1),),
}


def assert_budget(selector: Selector, selection: Selection, budget: int = 9) -> None:
    """The budget is met, or by methods that count for themselves not exceeded."""
    assert selection.k == budget or (selector.adaptive and 1 <= selection.k < budget)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_keeps_exactly_the_budget(method: str, grids: tuple[tuple[int, int, int], ...]) -> None:
    selector = get_selector(method)
    n = make_context(selector, 1, grids).n
    for budget in sorted({1, 2, n // 3, n // 2, n - 1, n, n + 7} - {0}):
        selection = selector.select(make_context(selector, budget, grids))
        assert selection.n == n
        assert_budget(selector, selection, min(budget, n))  # ascending and distinct is what Selection itself checks


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_selection(method: str) -> None:
    selector = get_selector(method)
    one, two = (selector.select(make_context(selector, 9)) for _ in range(2))
    assert one.to_dict() == two.to_dict()


@pytest.mark.parametrize("method", METHODS)
def test_no_side_effects(method: str) -> None:
    selector = get_selector(method)
    context = make_context(selector, 9)
    before = {name: getattr(context, name).clone() for name in FLOATS}
    state = torch.get_rng_state()
    selector.select(context)
    assert torch.equal(torch.get_rng_state(), state), "a selector draws from ctx.generator only"
    for name, value in before.items():
        assert torch.equal(getattr(context, name), value), f"{name} was modified"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(method: str, dtype: torch.dtype) -> None:
    selector = get_selector(method)
    half = make_context(selector, 9, dtype=dtype)
    wide = make_context(selector, 9, dtype=dtype)
    for name in FLOATS:
        setattr(wide, name, getattr(wide, name).float())
    assert torch.equal(selector.select(half).keep, selector.select(wide).keep)
    if isinstance(selector, ScoreSelector):
        assert torch.equal(selector.score(half), selector.score(wide))


@pytest.mark.parametrize("method", METHODS)
def test_large_half_precision_features_stay_finite(method: str) -> None:
    selector = get_selector(method)
    context = make_context(selector, 9, dtype=torch.float16)
    for name in ("features", "keys", "hidden_states"):
        setattr(context, name, torch.full_like(getattr(context, name), 6e4) * torch.sign(getattr(context, name)))
    assert_budget(selector, selector.select(context.check()))


@pytest.mark.parametrize("method", METHODS)
def test_equal_tokens_are_legal(method: str) -> None:
    selector = get_selector(method)
    context = make_context(selector, 9)
    for name in FLOATS:
        setattr(context, name, torch.ones_like(getattr(context, name)))
    assert_budget(selector, selector.select(context.check()))


@pytest.mark.parametrize("method", METHODS)
def test_zero_tokens_are_legal(method: str) -> None:
    selector = get_selector(method)
    context = make_context(selector, 9)
    for name in FLOATS:
        setattr(context, name, torch.zeros_like(getattr(context, name)))
    assert_budget(selector, selector.select(context.check()))


@pytest.mark.parametrize("method", [m for m in METHODS if issubclass(selectors()[m], ScoreSelector)])
def test_kept_are_the_best_under_the_own_score(method: str) -> None:
    selector = get_selector(method)
    assert isinstance(selector, ScoreSelector)
    for seed in range(5):
        context = make_context(selector, 9, seed=seed)
        scores, mask = selector.score(context), selector.select(context).mask
        assert scores.dtype == torch.float32
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("method", METHODS)
def test_metadata(method: str) -> None:
    cls = selectors()[method]
    assert cls.name == method
    assert cls.paper
    assert cls.__name__.endswith("Selector")
    assert (cls.__doc__ or "").strip()
    assert all(stage.layer is None or stage.layer >= 0 for stage in cls().stages())
    assert set(cls().vision_layers(depth=24, feature_layer=22)) <= set(range(24))
    assert cls() == get_selector(method)
    assert hash(cls()) == hash(get_selector(method))
