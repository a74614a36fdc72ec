"""Invariant 8: patches that leave inside the tower are as if masked from that layer on, in the untouched tower.

The reference masks keys in the attention of the untouched tower. Which patches those are, the engine says; that they
are the patches of the tokens that left is checked by the features, and in `tests/engine/test_patches_to_tokens.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from tests import reference, tiny
from tests.invariants.matrix import METHODS, Method, borrowed, build, method, sharp, sharp_borrowed
from vtc.adapters.base import TowerUnit
from vtc.config import CompressionConfig
from vtc.core.sites import parse_site
from vtc.engine import encoder
from vtc.engine.in_tower import TowerPass
from vtc.engine.install import adapter_for
from vtc.engine.plan import tower_layer
from vtc.errors import UnsupportedModelError

INTERPOLATED = ("llava_onevision_video",)
FAMILIES = tuple(family for family in tiny.FAMILIES if family.name not in INTERPOLATED)
EXACT = tuple(family for family in FAMILIES if not family.hybrid)


@dataclasses.dataclass(frozen=True)
class Bright(vtc.Selector):
    """Keeps what is brighter than the mean: another number of patches of every crop."""

    name, paper = "bright", "a test"
    sites = (vtc.Pixels, vtc.VisionLayer, vtc.BeforeDecoder)
    adaptive = True

    def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
        score = ctx.features.float().sum(dim=1)
        return vtc.Selection(ctx.n, (score >= score.mean()).nonzero()[:, 0])


@pytest.fixture(autouse=True)
def _bright() -> None:
    vtc.register_selector(Bright)


def config(name: str, at: str, keep_ratio: float = 0.5, **options: Any) -> vtc.CompressionConfig:
    return vtc.CompressionConfig(name, keep_ratio=keep_ratio, at=at, options=options)


SETTINGS: dict[str, tuple[vtc.CompressionConfig, ...]] = {
    "random at pixels": (config("random", "pixels"),),
    "divprune at pixels": (config("divprune", "pixels"),),
    "random at vision:1": (config("random", "vision:1", 0.3),),
    "divprune at vision:1": (config("divprune", "vision:1"),),
    "bright at vision:1": (config("bright", "vision:1"),),
    "pixelprune over time": (config("pixelprune", "pixels", over="time", similarity="mean", tau=1.13),),
    **{name: method(name).stages for name in ("pixelprune", "flowcut")},
    "flowcut received": (
        CompressionConfig("flowcut", keep_ratio=0.3, options={"layers": (0,), "score_source": "received"}),
    ),
    "as-vit": (CompressionConfig("adaptive-sparse-vit", keep_tokens=99, options={"thresholds": 1.0, "layers": (1,)}),),
    "as-vit received": (
        CompressionConfig(
            "adaptive-sparse-vit",
            keep_tokens=99,
            options={"thresholds": 1.0, "layers": (1,), "score_source": "received"},
        ),
    ),
    "down to the decoder": (
        config("uniform", "pixels", 0.8),
        config("divprune", "vision:1", 0.7),
        config("divprune", "decoder", 0.7),
        config("fastv", "decoder:2", 0.5),
    ),
}


def over_settings(families: tuple[tiny.Family, ...]) -> Any:
    cases = [
        pytest.param(family, stages, id=f"{family}-{name}")
        for family in families
        for name, stages in SETTINGS.items()
        if not (family.hybrid and name == "down to the decoder")
        and (family.like is None or name in ("bright at vision:1", "flowcut received", "down to the decoder"))
        and (family.cls or not any(m.needs_cls for m in METHODS if m.name == name))
    ]
    return pytest.mark.parametrize(("family", "stages"), cases)


@contextlib.contextmanager
def seen_towers() -> Iterator[list[TowerPass]]:
    """Collect the passes through towers while entered."""
    seen: list[TowerPass] = []

    class Seen(TowerPass):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen.append(self)

    before, encoder.TowerPass = encoder.TowerPass, Seen  # type: ignore[misc]
    try:
        yield seen
    finally:
        encoder.TowerPass = before  # type: ignore[misc]


@contextlib.contextmanager
def masked(model: Any, modality: str, tower: TowerPass) -> Iterator[None]:
    """Hide, in every layer of the untouched tower, the patches that had left before it. They still see themselves."""
    attentions = {module: layer for layer, module in enumerate(adapter_for(model).tower_attentions(modality))}
    begun: dict[int, int] = {}
    name = "sdpa"
    original = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        layer = attentions.get(module)
        left = [each for site, each in tower.survivors.items() if tower_layer(site) <= (-1 if layer is None else layer)]
        if left:
            start = begun.get(layer, 0)  # packed towers call once per window or image
            keep = left[-1][:, start : start + key.shape[2]]
            begun[layer] = start + key.shape[2]
            allowed = keep[:, None, None] | torch.eye(key.shape[2], dtype=torch.bool)
            if attention_mask is not None:
                theirs = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
                allowed = allowed & theirs | torch.eye(key.shape[2], dtype=torch.bool)
            attention_mask = allowed
        return original(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    tower_module = adapter_for(model).tower(modality)
    try:
        with tower_module.register_forward_pre_hook(lambda *_: begun.clear()):
            yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = original


@over_settings(EXACT)
@torch.no_grad()
def test_dropping_equals_masking(family: tiny.Family, stages: tuple[vtc.CompressionConfig, ...]) -> None:
    # Every tower takes pictures alone or several at once; that a row is as in its batch is the test after next.
    for kind in ("two_images", "no_image_row"):
        check_masking(sharp_borrowed(family), stages, kind)


@pytest.mark.parametrize("kind", ["single", "two_images"])
@pytest.mark.parametrize("family", ["llava", "llava_dinov2", "llava_next", "internvl_tiles", "video_llava"])
@pytest.mark.parametrize("name", ["flowcut", "adaptive-sparse-vit"])
@torch.no_grad()
def test_several_places_in_the_tower_equal_masking(name: str, family: str, kind: str) -> None:
    # Towers of random weights look at all patches alike, and then nothing leaves at the first places.
    case = sharp(tiny.family(family))
    for weight_name, weight in adapter_for(case.model).tower(case.family.modality).named_parameters():
        weight.data *= 20 if weight_name.endswith(("q_proj.weight", "query.weight")) else 1
    first = int(family == "internvl_tiles")  # whose [CLS] is zero at first, so that it asks for nothing
    options: dict[str, Any] = {"layers": (first, first + 1)}
    if name == "adaptive-sparse-vit":
        options = {"layers": (first + 1, first + 2), "thresholds": (0.3, 0.6)}
    check_masking(case, (CompressionConfig(name, keep_ratio=0.4, options=options),), kind)


def check_masking(case: tiny.TinyCase, stages: tuple[vtc.CompressionConfig, ...], kind: str) -> None:
    family = case.family
    inputs = case.batch(kind)
    with vtc.compressed(case.model, list(stages)) as model, seen_towers() as towers:
        ours = model(**inputs).logits
        report = vtc.report(model)
    (tower,) = towers
    assert all(segment.tokens_after < segment.tokens_before for segment in report.segments)
    assert all(bool((~left).any()) for left in tower.survivors.values())
    with masked(case.model, family.modality, tower):
        expected = reference.Reference.of(case.model, inputs, report)
        theirs = expected.prefill().logits
    assert reference.max_error(ours[expected.visible], theirs[expected.visible]) <= 1e-6


@over_settings(FAMILIES)
@torch.no_grad()
def test_keeping_all_changes_no_bit(family: tiny.Family, stages: tuple[vtc.CompressionConfig, ...]) -> None:
    case = borrowed(family)
    inputs, plain = case.batch("ragged"), case.plain("ragged").logits
    whole = [
        dataclasses.replace(stage, keep_ratio=1.0, keep_tokens=None) for stage in stages if stage.method != "bright"
    ]
    if whole:
        with vtc.compressed(case.model, whole) as model:
            assert torch.equal(model(**inputs).logits, plain)
            assert all(segment.tokens_after == segment.tokens_before for segment in vtc.report(model).segments)
    with vtc.compressed(case.model, list(stages)) as model:
        assert not torch.equal(model(**inputs).logits, plain)


@over_settings(EXACT)
def test_a_batch_equals_its_rows(family: tiny.Family, stages: tuple[vtc.CompressionConfig, ...]) -> None:
    case = sharp_borrowed(family)
    inputs = case.batch("two_images")
    said = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with vtc.compressed(case.model, list(stages)) as model:
        together = model.generate(**inputs, **said)
        kept = [(segment.row, segment.kept.tolist()) for segment in vtc.report(model).segments]
        logits = reference.stacked_logits(together)
        alone = []
        for number, row in enumerate(case.rows("two_images")):
            answer = model.generate(**row, **said)
            alone += [(number, segment.kept.tolist()) for segment in vtc.report(model).segments]
            assert reference.max_error(reference.stacked_logits(answer)[0], logits[number]) <= 1e-6
    assert kept == alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["divprune at vision:1", "bright at vision:1"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
@torch.no_grad()
def test_half_precision_stays_finite(family: str, name: str, dtype: torch.dtype) -> None:
    case = build(tiny.family(family), dtype=dtype)
    inputs = case.batch("two_images")
    with vtc.compressed(case.model, list(SETTINGS[name])) as model, seen_towers() as towers:
        ours = model(**inputs).logits
        report = vtc.report(model)
    with masked(case.model, "image", towers[0]):
        expected = reference.Reference.of(case.model, inputs, report)
        theirs = expected.prefill().logits
    error = reference.max_error(ours[expected.visible], theirs[expected.visible])
    assert error <= (0.1 if dtype == torch.float16 else 0.5)


@pytest.mark.parametrize("family", EXACT, ids=str)
@torch.no_grad()
def test_features_of_survivors_are_those_of_the_masked_tower(family: tiny.Family) -> None:
    case = sharp(family)
    inputs = case.batch("single")
    with vtc.compressed(case.model, "random", keep_ratio=0.5, at="vision:1") as model, seen_towers() as towers:
        ours = reference.merged_embeddings(model, inputs)  # behind the engine, which has packed them
        report = vtc.report(model)
    with masked(case.model, family.modality, towers[0]):
        theirs = reference.merged_embeddings(case.model, inputs)
    visible = reference.Reference.of(case.model, inputs, report).visible
    assert ours.shape[1] == int(visible.sum())
    assert reference.max_error(ours[0], theirs[visible]) <= 1e-6


@pytest.mark.parametrize("family", INTERPOLATED)
def test_features_interpolated_across_cells_are_refused(family: str) -> None:
    case = build(tiny.family(family))
    inputs = case.batch("single")
    plain = case.model(**inputs).logits
    vtc.compress(case.model, "random", keep_ratio=0.5, at="vision:1")
    with pytest.raises(UnsupportedModelError, match="interpolated across patches"):
        case.model(**inputs)
    vtc.restore(case.model)
    assert torch.equal(case.model(**inputs).logits, plain)


@pytest.mark.parametrize("name", ["vtc-cls", "random"])
def test_layers_really_get_shorter(name: str) -> None:
    case = build(tiny.family("llava"))
    lengths: list[int] = []
    for block in adapter_for(case.model).tower_blocks("image"):
        block.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    options = {"start_layer": 0} if name == "vtc-cls" else {}
    with vtc.compressed(case.model, name, keep_ratio=0.25, at="vision:2", **options) as model:
        model(**case.batch("single"))
    assert lengths == [17, 17, 5, 5]  # the last layer makes no features, but runs


@pytest.mark.parametrize(
    ("family", "name", "at", "match"),
    [
        ("llava", "vtc-cls", "pixels", "cannot work at 'pixels'"),
        ("llava", "vtc-cls", "vision:0", "no layer of the tower has run"),
        ("llava", "divprune", "vision:3", "come from tower layer 2"),
        ("llava", "fastv", "vision:1", "cannot work at 'vision:1'"),
        ("qwen2_5_vl", "vtc-cls", "vision:1", r"no \[CLS\] token"),
    ],
)
def test_what_cannot_be_is_refused(family: str, name: str, at: str, match: str) -> None:
    case = build(tiny.family(family))
    options = {"start_layer": 1} if name == "vtc-cls" and family == "llava" else {}
    with pytest.raises(vtc.VtcError, match=match):
        vtc.compress(case.model, name, keep_ratio=0.5, at=at, **options)
    assert not vtc.is_compressed(case.model)


def test_checkpointed_towers_are_refused() -> None:
    case = build(tiny.family("llava"))
    case.model.train()
    enable = getattr(case.model, "activation_checkpointing_enable", case.model.gradient_checkpointing_enable)
    enable()
    vtc.compress(case.model, "random", keep_ratio=0.5, at="vision:1")
    with pytest.raises(UnsupportedModelError, match="checkpointed"):
        case.model(**case.batch("single"), use_cache=False)


def test_a_tower_that_runs_twice_is_refused() -> None:
    cells = torch.arange(4)[:, None]
    tower = TowerPass([TowerUnit(0, cells, cells, (1, 2, 2))], {}, 0, "image", lambda stage: {})
    assert tower.enter(0, (torch.zeros(1, 4, 8),), {}) is None
    tower.leave(None)
    with pytest.raises(UnsupportedModelError, match="ran twice"):
        tower.enter(0, (torch.zeros(1, 4, 8),), {})


def test_gradients_reach_the_tower() -> None:
    case = build(tiny.family("qwen2_5_vl"))
    with vtc.compressed(case.model, "random", keep_ratio=0.5, at="vision:1") as model:
        model(**case.batch("single")).logits.sum().backward()
    assert case.model.model.visual.blocks[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_sites_have_their_place_in_the_order() -> None:
    assert parse_site("pixels").order < parse_site("vision:0").order < parse_site("decoder").order


def test_a_method_of_the_decoder_follows() -> None:
    fastv: Method = method("fastv")
    case = build(tiny.family("llava"))
    vtc.compress(case.model, [config("random", "vision:1"), *fastv.stages])
    case.model.generate(**case.batch("single"), max_new_tokens=2, do_sample=False)
    (segment,) = vtc.report(case.model).segments
    assert [selection.k for _, selection in segment.selections] == [8, 4]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_report_counts_the_towers_arithmetic(family: str) -> None:
    case = build(tiny.family(family))
    with vtc.compressed(case.model, [config("random", "vision:1"), config("random", "decoder")]) as model:
        model(**case.batch("single"))
        report = vtc.report(model)
    assert [str(site) for site, _, _ in report.sites] == ["vision:1", "decoder"]
    assert [left for _, _, left in report.sites] == [report.sites[1][1], report.visual_tokens_after]
    left = report.tower_flops_after / report.tower_flops_before
    assert 0.5 < left < 0.7  # the first of four layers sees all, and [CLS] stays
    assert "tower FLOPs" in str(report)
