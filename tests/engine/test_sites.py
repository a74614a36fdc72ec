"""Where tokens leave: any method of one place can be put at another one that works, and the rest is refused by name."""

from __future__ import annotations

import pytest
import torch

import vtc
from tests import tiny
from tests.invariants.matrix import build

FAMILIES = ("llava", "qwen2_5_vl", "internvl")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("at", ["decoder:1", "decoder:3", vtc.DecoderLayer(3)], ids=str)
@torch.no_grad()
def test_a_method_moves_into_the_decoder(name: str, at: str | vtc.Site) -> None:
    case = build(tiny.family(name))
    inputs = case.batch("ragged")
    with vtc.compressed(case.model, "divprune", keep_ratio=0.5) as model:
        model(**inputs)
        before = vtc.report(model)
    with vtc.compressed(case.model, "divprune", keep_ratio=0.5, at=at) as model:
        model(**inputs)
        moved = vtc.report(model)
    layer = int(str(at)[-1])
    for one, other in zip(before.segments, moved.segments, strict=True):
        assert one.kept.tolist() == other.kept.tolist(), "the same features, the same choice"
        assert [site for site, _ in other.selections] == [vtc.DecoderLayer(layer)]
    assert moved.visual_tokens_per_layer[layer - 1] == moved.visual_tokens_before
    assert moved.visual_tokens_per_layer[layer] == before.visual_tokens_after
    assert f"at=decoder:{layer}" in str(moved)


@torch.no_grad()
def test_decoder_is_the_default_and_signals_of_the_tower_follow() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    kept = []
    for at in (None, "decoder", "decoder:2"):
        with vtc.compressed(case.model, "vtc-cls", keep_ratio=0.25, start_layer=1, at=at) as model:
            model(**inputs)
            kept.append(vtc.report(model).segments[0].kept.tolist())
    assert kept[0] == kept[1] == kept[2]


@torch.no_grad()
def test_fastv_reads_the_layer_before_its_site() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    kept = []
    for options in ({"layer": 3}, {"at": "decoder:3"}):
        with vtc.compressed(case.model, "fastv", keep_ratio=0.5, **options) as model:
            model(**inputs)
            kept.append(vtc.report(model).segments[0].kept.tolist())
    assert kept[0] == kept[1]


@torch.no_grad()
def test_one_method_at_several_sites() -> None:
    case = build(tiny.family("llava"))
    sites = [vtc.CompressionConfig("uniform", keep_ratio=0.5, at=at) for at in ("decoder", "decoder:1", "decoder:3")]
    with vtc.compressed(case.model, sites) as model:
        model(**case.batch("single"))
        assert vtc.report(model).visual_tokens_per_layer == (8, 4, 4, 2)
    with pytest.raises(vtc.ConfigError, match=r"order in which tokens meet them.*decoder:3, decoder"):
        vtc.compress(case.model, sites[::-1])


@pytest.mark.parametrize("method", ["random", "uniform", "divprune"])
def test_methods_without_a_rule_for_steps_are_refused(method: str) -> None:
    model = build(tiny.family("llava")).model
    with pytest.raises(
        vtc.UnsupportedMethodError, match=f"{method}.*'cache:decoding'; it can at: pixels, vision:K, decoder"
    ):
        vtc.compress(model, method, keep_ratio=0.5, at="cache:decoding")
    assert not vtc.is_compressed(model)


@pytest.mark.parametrize(
    ("method", "options", "at", "error", "match"),
    [
        ("uniform", {}, "decoder:4", vtc.ConfigError, "decoder layer 4; this model has layers 1 to 3"),
        ("uniform", {}, "decoder:0", vtc.ConfigError, 'tokens leave at "decoder"'),
        ("uniform", {}, "layer 2", vtc.ConfigError, "at must be a site or one of the words.*'layer 2'"),
        ("fastv", {}, "decoder", vtc.UnsupportedMethodError, "fastv cannot work at 'decoder'; it can at: decoder:K"),
        ("todre", {}, "decoder:2", vtc.UnsupportedMethodError, "todre .* places of its own .decoder, decoder:3"),
        ("atp", {}, "decoder", vtc.UnsupportedMethodError, "atp cannot be placed at 'decoder'"),
        ("aim", {"prune": False}, "decoder:2", vtc.UnsupportedMethodError, "aim cannot work at 'decoder:2'"),
    ],
)
def test_impossible_places_are_refused_before_the_model_is_touched(
    method: str, options: dict[str, object], at: str, error: type[Exception], match: str
) -> None:
    model = build(tiny.family("llava")).model
    with pytest.raises(error, match=match):
        vtc.compress(model, method, keep_ratio=0.5, at=at, **options)
    assert not vtc.is_compressed(model)


def test_inside_the_decoder_of_a_hybrid() -> None:
    model = build(tiny.family("qwen3_5")).model
    with pytest.raises(vtc.UnsupportedMethodError, match=r"uniform removes tokens inside the decoder.*recurrent"):
        vtc.compress(model, "uniform", keep_ratio=0.5, at="decoder:2")


def test_stages_can_be_given_in_one_line() -> None:
    case = tiny.build("llava")
    batch = case.batch("single")
    line, seed = "random@vision:1=0.5+divprune=0.5", 3
    configs = [
        vtc.CompressionConfig("random", keep_ratio=0.5, at="vision:1", seed=seed),
        vtc.CompressionConfig("divprune", keep_ratio=0.5, seed=seed),
    ]
    kept = []
    for method in (line, configs):
        more = {"seed": seed} if method is line else {}
        with vtc.compressed(case.model, method, **more), torch.no_grad():
            case.model(**batch)
            assert list(vtc.report(case.model).configs) == configs
            kept.append(vtc.report(case.model).segments[0].kept)
    assert torch.equal(*kept)
    for more in ({"keep_ratio": 0.5}, {"keep_tokens": 3}, {"at": "decoder"}, {"layer": 2}):
        with pytest.raises(vtc.ConfigError, match="given beside"):
            vtc.compress(case.model, line, **more)
    assert not vtc.is_compressed(case.model)
