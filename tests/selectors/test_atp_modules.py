"""Modules of `atp`: what they read, how they choose, and that what they learn from is what happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests import learned, tiny
from vtc.core.observations import TokenGrids
from vtc.core.stage import ModelShape
from vtc.engine.install import engine_of
from vtc.errors import ConfigError
from vtc.selectors import AtpSelector
from vtc.selectors.learned import read_modules
from vtc.selectors.learned.atp import AtpModule, AtpModules, TextValues, needs, redundancy_score
from vtc.selectors.learned.atp import training as atp_training
from vtc.selectors.learned.atp.training import Study

ORIGIN = TokenGrids(((1, 6, 6),)).origin()
SAID = torch.arange(3.0)


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 36, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def modules(shares: tuple[float, ...] = (0.5, 0.25), **options: Any) -> AtpModules:
    torch.manual_seed(0)
    made = AtpModules(shares, 3, grid=5, width=4, **options)
    for weight in made.parameters():
        weight.data += torch.randn(weight.shape)
    return made.requires_grad_(False)


def test_untrained_modules_keep_the_plan() -> None:
    made = AtpModules((0.5, 0.25), 3)
    assert [made.count(place, *scores(), ORIGIN, SAID) for place in (0, 1)] == [18, 9]
    assert made.count(1, *scores()[:, :4], ORIGIN[:4], SAID) == 4, "of 36 at the input, but only 4 are left"
    assert AtpModules((0.001,), 3).count(0, *scores(), ORIGIN, SAID) == 1, "at least one"


@pytest.mark.parametrize("layout", ["sorted", "raster"])
def test_layouts_read_scores_of_any_size(layout: str) -> None:
    module = AtpModule(3, layout, grid=5, width=4)
    read = module.read(*scores(), ORIGIN, SAID)
    assert read.shape == (module.mix.in_features + 3,)
    torch.testing.assert_close(module.read(*(100 * scores()), ORIGIN, 7 * SAID), read, msg="relative")
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module.read(*scores()[:, order], ORIGIN[order], SAID), read, msg="tokens have no order")
    moved = module.read(*scores().flip(1), ORIGIN, SAID)
    assert torch.allclose(moved, read) == (layout == "sorted"), "only one layout knows where a score stands"
    several = TokenGrids(((2, 6, 6), (1, 4, 8))).origin()
    assert module.read(torch.rand(104), torch.rand(104), several, SAID).shape == read.shape
    assert module.read(torch.rand(1), torch.rand(1), ORIGIN[:1], SAID).shape == read.shape


def test_sorted_scores_are_sampled_from_largest_to_smallest() -> None:
    module = AtpModule(3, "sorted", grid=3)
    values = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    read = module.read(values, values, TokenGrids(((1, 1, 5),)).origin(), SAID)
    torch.testing.assert_close(read[:-3], torch.tensor([5 / 8, 3 / 6, 1 / 4] * 2 + [1.0]))
    torch.testing.assert_close(read[-3:], 0.1 * 1.5**0.5 * torch.tensor([-1.0, 0.0, 1.0]))


def test_those_with_the_highest_scores_stay() -> None:
    made = modules((0.2, 0.1))
    selector = AtpSelector(layers=(1, 2))
    object.__setattr__(selector, "module", made)
    s_cross, s_self = scores()
    ctx = vtc.VisualContext(
        features=torch.empty(36, 0),
        budget=36,
        generator=torch.Generator(),
        grids=((1, 6, 6),),
        site=vtc.DecoderLayer(2),
        signals={
            selector.stages()[0].requires[0]: torch.stack([s_cross, s_self]),
            vtc.Origin(): ORIGIN,
            TextValues(): SAID,
        },
    )
    kept = selector.select(ctx)
    count = made.count(0, s_self, s_cross, ORIGIN, SAID)
    assert 1 < count < 36
    best = redundancy_score(s_self, s_cross, "relative").topk(count).indices.sort().values
    assert torch.equal(kept.keep, best)
    ctx.budget = 2
    assert selector.select(ctx).k == 2, "the budget is a ceiling"


def test_the_need_is_where_the_answer_stops_changing() -> None:
    from_the_plan_on, never, always = [1.0, 1.0, 0.5, 0.0, 0.0], [1.0] * 5, [0.0] * 5
    found = needs(torch.tensor([from_the_plan_on, never, always]))
    torch.testing.assert_close(found.exp(), torch.tensor([1.0, 4.0, 0.25]))


def test_modules_learn_the_need_and_keep_the_plan_on_average() -> None:
    """Half of the samples need more; what tells them apart is the scores, or the text."""
    for read in ("scores", "text"):
        torch.manual_seed(1)
        made = AtpModules((0.5,), 3, grid=2, width=8)
        plain, full = torch.zeros(8), torch.zeros(8)
        full[slice(5) if read == "scores" else slice(5, 8)] = 1.0
        changes = torch.tensor([[1.0, 0.9, 0.8, 0.3, 0.0], [0.2, 0.0, 0.0, 0.0, 0.0]])
        both = Study(changes, torch.stack([full, plain])[:, None, None, None].expand(2, 5, 1, 1, 8))
        optimizer = torch.optim.AdamW(made.parameters(), lr=2e-2, weight_decay=0.0)
        for _ in range(400):
            value = atp_training.loss(made, both)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        each = made.places[0]
        torch.testing.assert_close(each.need(torch.stack([full, plain])), needs(changes), atol=0.02, rtol=0)
        many, few = (float(each(what).detach()) for what in (full, plain))
        assert many > 1.5 * few
        assert (few + many) / 2 == pytest.approx(1.0, abs=0.05)


def test_the_loss_of_stacked_samples_is_the_mean_of_theirs() -> None:
    made = modules().requires_grad_(True)
    reads = torch.randn(3, 5, 2, 2, 14, generator=torch.Generator().manual_seed(4))
    changes = torch.rand(3, 5, generator=torch.Generator().manual_seed(5))
    whole = atp_training.loss(made, Study(changes, reads))
    parts = torch.stack([atp_training.loss(made, Study(*each)) for each in zip(changes, reads, strict=True)]).mean()
    torch.testing.assert_close(whole, parts)
    for name, weight in made.named_parameters():
        (one,), (other,) = (torch.autograd.grad(value, [weight], retain_graph=True) for value in (whole, parts))
        torch.testing.assert_close(one, other, msg=name)


@pytest.fixture
def case() -> tiny.TinyCase:
    return tiny.build("llava")


def counts(model: Any) -> list[list[int]]:
    return [[selection.k for _, selection in segment.selections] for segment in vtc.report(model).segments]


@torch.no_grad()
def test_a_factor_keeps_the_plan_of_every_picture(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder = learned.atp(case.model, tmp_path, target=0.25)
    shares = read_modules(folder, "atp")[0].settings["shares"]
    assert sum(shares) / 3 == pytest.approx(0.25)
    for factor in (1.0, (1.0, 0.5, 0.25)):
        vtc.compress(case.model, "atp", keep_tokens=999, modules=folder, factor=factor)
        case.model(**case.batch("two_images"))
        factors = factor if isinstance(factor, tuple) else (factor,) * 3
        planned = [max(1, round(f * share * 16)) for f, share in zip(factors, shares, strict=True)]
        assert counts(case.model) == [planned] * len(counts(case.model))


@torch.no_grad()
def test_saved_modules_choose_the_same_and_rows_stand_alone(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder = learned.atp(case.model, tmp_path / "one", target=0.5, scale=2.0)
    before = case.model(**case.batch("ragged")).logits
    vtc.compress(case.model, "atp", keep_tokens=999, modules=folder)
    first = case.model(**case.batch("ragged")).logits
    chosen = counts(case.model)
    assert all(1 <= count <= 16 for own in chosen for count in own)
    selector = engine_of(case.model).plan.stages[0].selector
    assert all(stage.selector is selector for stage in engine_of(case.model).plan.stages), "one module for all places"
    vtc.selectors.learned.save_modules(tmp_path / "two", selector.made_for, selector.module)
    vtc.compress(case.model, "atp", keep_tokens=999, modules=str(tmp_path / "two"))
    assert torch.equal(case.model(**case.batch("ragged")).logits, first)
    alone = []
    for row in case.rows("ragged"):
        case.model(**row)
        alone += counts(case.model)
    assert alone == chosen
    vtc.restore(case.model)
    assert torch.equal(case.model(**case.batch("ragged")).logits, before)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["modules.json", "modules.safetensors"]


def test_training_learns_and_goes_on_where_it_stopped(
    case: tiny.TinyCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*case.rows("single"), *case.rows("ragged")]
    settings = {"steps": 4, "batch": 2, "rate": 1e-2, "save_every": 1, "progress": False, "target": 0.25}
    whole = vtc.train(case.model, None, prompts, "atp", tmp_path / "whole", **settings)
    original, calls = atp_training.loss, iter(range(100))

    def interrupted(*args: Any) -> torch.Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    recipe = vtc.tuning.train.Recipe(atp_training.begin, atp_training.study, interrupted)
    with monkeypatch.context() as patch:
        patch.setitem(vtc.tuning.train.TRAINABLE, "atp", recipe)
        with pytest.raises(KeyboardInterrupt):
            vtc.train(case.model, None, prompts, "atp", tmp_path / "parts", **settings)
    parts = vtc.train(case.model, None, prompts, "atp", tmp_path / "parts", **settings)
    (first, weights), (second, again) = (read_modules(folder, "atp") for folder in (whole, parts))
    assert first.settings == second.settings
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    shape = ModelShape(4, family="llava", width=64)
    begun = atp_training.begin(shape, None, learned.decoder_of(case.model), target=0.25)[1].state_dict()
    assert not torch.equal(weights["places.0.head.bias"], begun["places.0.head.bias"])


def test_wrong_modules_are_refused(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder = learned.atp(case.model, tmp_path / "made")
    with pytest.raises(ConfigError, match="holds 3 modules for the 1 layers"):
        vtc.compress(case.model, "atp", keep_tokens=9, modules=folder, layers=(1,))
    with pytest.raises(ConfigError, match="trained for the family llava, but this model has internvl"):
        vtc.compress(tiny.build("internvl").model, "atp", keep_tokens=9, modules=folder)
    with pytest.raises(ConfigError, match="factor multiplies what modules plan"):
        AtpSelector(factor=1.0)
    with pytest.raises(ConfigError, match="path of a folder"):
        AtpSelector(modules=3)
    with pytest.raises(ConfigError, match="read 3 values of the text, the model has 2"):
        modules().count(0, *scores(), ORIGIN, SAID[:2])
    with pytest.raises(ConfigError, match="the width of the model's is not known"):
        atp_training.begin(ModelShape(4, family="llava", width=64))
    for settings, said in (
        ({"layout": "round"}, "layout must be"),
        ({"grid": 0}, "grid must be an integer"),
        ({"shares": [0.5, 0]}, "shares must be fractions"),
        ({"breadth": 1}, "describes its modules wrongly"),
    ):
        written = json.loads((Path(folder) / "modules.json").read_text())
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "modules.json").write_text(json.dumps({**written, "settings": {**written["settings"], **settings}}))
        (other / "modules.safetensors").write_bytes((Path(folder) / "modules.safetensors").read_bytes())
        with pytest.raises(ConfigError, match=said):
            AtpSelector(modules=str(other))
