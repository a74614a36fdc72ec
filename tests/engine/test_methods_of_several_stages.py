"""ToDRE, ATP, AIM and VFlowOpt inside models: they run, keep what they say, and read what they claim to read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests import reference, tiny
from tests.invariants.matrix import build, sharp, tolerance
from tests.invariants.test_2_masking import GREEDY
from tests.invariants.test_3_batches import kept
from tests.invariants.test_7_memory import squares
from vtc import kernels
from vtc.core.context import VisualContext
from vtc.engine.cache import CACHE
from vtc.errors import ConfigError, InputError, UnsupportedMethodError
from vtc.kernels import reference as specification
from vtc.selectors import AimSelector, AtpSelector, ToDreSelector, VFlowOptSelector
from vtc.selectors.aim import PageRank
from vtc.selectors.learned.atp import ModalityAttention, mean_logits
from vtc.selectors.todre import AttentionExchange
from vtc.selectors.vflowopt import ContextRelevance, PixelEntropy

FAMILIES = ("llava", "llava_onevision", "llava_onevision_video", "qwen2_5_vl", "qwen2_5_vl_video", "internvl")
MERGING = {
    "aim": ("aim", {"keep_ratio": 0.4, "metric": "features"}),
    "aim by keys": ("aim", {"keep_ratio": 0.5, "l1": 1, "l2": 3}),
    "vflowopt": ("vflowopt", {"keep_ratio": 0.3, "t": 1.2, "cell": 2.0}),
    "vflowopt released": ("vflowopt", {"keep_ratio": 0.5, "t": 1.2, "variant": "released", "alpha": 0.5}),
}
DROPPING = {
    "todre": ("todre", {"keep_ratio": 0.4, "pivot": "received"}),
    "todre, all leave": ("todre", {"keep_ratio": 0.4, "pivot": "center", "tau": 1.0, "exit_layer": 2}),
    "todre, some leave": ("todre", {"keep_ratio": 0.9, "pivot": "random", "tau": 0.45, "exit_layer": 1}),
    "atp": ("atp", {"keep_ratio": 0.9}),
    "atp, few": ("atp", {"keep_tokens": 10**6, "theta_r": 0.6, "theta_s": (1.0, 0.1, 1.0), "text": "all"}),
    "aim, pruning": ("aim", {"keep_tokens": 10**6, "l1": 0, "l2": 3}),
    "vflowopt, unmerged": ("vflowopt", {"keep_ratio": 0.3, "t": 1.2, "recycle": False, "alpha": 0.5}),
}
METHODS = {**MERGING, **DROPPING}

over_families = pytest.mark.parametrize("name", FAMILIES)


def over(methods: dict[str, Any]) -> Any:
    return pytest.mark.parametrize(("method", "options"), methods.values(), ids=methods)


def generated(case: tiny.TinyCase, inputs: dict[str, Any], steps: int = 3, **modes: Any) -> Tensor:
    out = case.model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **modes
    )
    return reference.stacked_logits(out)


# --- invariants -------------------------------------------------------------------------------------------------------


@over({label: case for label, case in METHODS.items() if case[1].get("pivot") != "random"})
@over_families
def test_a_batch_equals_its_rows(name: str, method: str, options: dict[str, Any]) -> None:
    case = sharp(tiny.family(name))
    with vtc.compressed(case.model, method, **options) as model:
        for kind in ("ragged", "two_images"):
            together = generated(case, case.batch(kind))
            choices, alone = kept(vtc.report(model)), {}
            for row, inputs in enumerate(case.rows(kind)):
                error = reference.max_error(together[row : row + 1], generated(case, inputs))
                assert error <= tolerance(case), (kind, row, error)
                alone |= {(row, index): tokens for (_, index), tokens in kept(vtc.report(model)).items()}
            assert choices == alone, kind


@over(DROPPING)
@over_families
def test_dropping_equals_masking(name: str, method: str, options: dict[str, Any]) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    with vtc.compressed(case.model, method, **options) as model:
        ours = model.generate(**inputs, **GREEDY)
        report = vtc.report(model)
    assert report.visual_tokens_after < report.visual_tokens_before
    expected = reference.Reference.of(case.model, inputs, report)
    theirs = expected.logits_along(reference.answers(ours, inputs))
    assert reference.max_error(reference.stacked_logits(ours), theirs) <= tolerance(case)


@over(METHODS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_caches_make_no_difference(name: str, method: str, options: dict[str, Any]) -> None:
    # Without a cache the prompt is fed again at every step, when the stages have long decided.
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    with vtc.compressed(case.model, method, **options):
        usual = generated(case, inputs)
        for other in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert reference.max_error(generated(case, inputs, **other), usual) <= tolerance(case), other
        assert torch.equal(generated(case, inputs), usual)


@pytest.mark.parametrize("method", ["todre", "atp", "aim", "vflowopt"])
@over_families
@torch.no_grad()
def test_keeping_everything_is_bit_identical(name: str, method: str) -> None:
    case = build(tiny.family(name))
    options = {"pivot": "center"} if method == "todre" else {}
    inputs = case.batch("ragged")
    plain = case.model(**inputs)
    with vtc.compressed(case.model, method, keep_ratio=1.0, **options) as model:
        packed = model(**inputs)
        assert vtc.report(model).visual_tokens_after == vtc.report(model).visual_tokens_before
    assert torch.equal(packed.logits, plain.logits)


@over(METHODS)
@pytest.mark.parametrize("name", ["llava_large", "internvl_large", "qwen2_5_vl_large"])
def test_no_score_makes_a_square(name: str, method: str, options: dict[str, Any]) -> None:
    case = build(tiny.family(name))
    inputs = case.batch("single")
    with vtc.compressed(case.model, method, **options) as model:
        assert squares(model, inputs) == []
        assert vtc.report(model).visual_tokens_after < vtc.report(model).visual_tokens_before


# --- counts ----------------------------------------------------------------------------------------------------------


def counts(model: Any) -> list[list[tuple[int | None, int, int]]]:
    """Per segment: (decoder layer, tokens before, tokens after) of every stage."""
    segments = vtc.report(model).segments
    return [[(getattr(site, "layer", None), s.n, s.k) for site, s in segment.selections] for segment in segments]


@over_families
@torch.no_grad()
def test_aim_follows_its_schedule_and_empties_the_last_layers(name: str) -> None:
    case = build(tiny.family(name))
    inputs = case.batch("ragged")
    with vtc.compressed(case.model, "aim", keep_ratio=0.5, l1=0, l2=3) as model:
        cache = model(**inputs)[CACHE]
        report = vtc.report(model)
        for segment, stages in zip(report.segments, counts(model), strict=True):
            n = segment.tokens_before - segment.structural
            entered = round(n / 2)
            after = [int(entered * rate) for rate in (1, 2 / 3, 1 / 3, 0)]
            assert stages == [
                (layer, before, k) for layer, before, k in zip((None, 1, 2, 3), [n, *after[:-1]], after, strict=True)
            ]
            assert segment.tokens_after == 0 == len(segment.kept)
    text = [int((row != tiny.IMAGE).logical_and(row != tiny.VIDEO).sum()) for row in inputs["input_ids"]]
    padding = (inputs["attention_mask"] == 0).sum(1)
    assert [layer.keys.shape[2] for layer in cache.layers][-1] == max(
        n - int(p) for n, p in zip(text, padding, strict=True)
    )


@pytest.mark.parametrize(("variant", "recycle"), [("paper", True), ("paper", False)])
@over_families
@torch.no_grad()
def test_vflowopt_keeps_its_budget_on_average_over_layers(name: str, variant: str, recycle: bool) -> None:
    case = build(tiny.family(name))
    for budget in (0.6, 0.25):
        with vtc.compressed(case.model, "vflowopt", keep_ratio=budget, cell=2.0, variant=variant, recycle=recycle):
            case.model(**case.batch("ragged"))
            for segment in vtc.report(case.model).segments:
                n, left = segment.tokens_before - segment.structural, []
                stages = {getattr(site, "layer", -1): s.k for site, s in segment.selections}
                for layer in range(len(case.model.get_decoder().layers)):
                    left.append(stages[max(at for at in stages if at <= layer)])
                # Each of the three counts is rounded, each rounding reaches the layers behind it.
                assert abs(sum(left) / len(left) - budget * n) <= 1.5


@over_families
@torch.no_grad()
def test_todre_leaves_no_visual_key_behind_the_exit(name: str) -> None:
    case = build(tiny.family(name))
    inputs = case.batch("two_images")
    visual = ((inputs["input_ids"] == tiny.IMAGE) | (inputs["input_ids"] == tiny.VIDEO)).sum(1)
    text = inputs["attention_mask"].sum(1) - visual
    for tau, gone in ((1.0, True), (1e-6, False)):
        with vtc.compressed(case.model, "todre", keep_ratio=0.5, pivot="center", exit_layer=2, tau=tau) as model:
            output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            lengths = [layer.keys.shape[2] for layer in output[CACHE].layers]
            left = [segment.tokens_after for segment in vtc.report(model).segments]
        assert lengths[0] == lengths[1] > int(text.max()) + 2
        assert (lengths[2] == lengths[3] == int(text.max()) + 2) == gone
        assert (sum(left) == 0) == gone


@torch.no_grad()
def test_todre_decides_per_row() -> None:
    # With a threshold between the ratios of two rows, one row's images leave and the other's stay.
    case = build(tiny.family("llava"))
    with spied(ToDreSelector) as seen, vtc.compressed(case.model, "todre", keep_ratio=0.5, tau=1e-6):
        case.model(**case.batch("ragged"))
    exits = [ctx for ctx in seen if ctx.site != vtc.BeforeDecoder()]
    ratios = sorted({float(ctx[AttentionExchange].max()) for ctx in exits})
    assert len(ratios) == 2, "one per row, though the second row has two images"
    with vtc.compressed(case.model, "todre", keep_ratio=0.5, tau=sum(ratios) / 2) as model:
        case.model(**case.batch("ragged"))
        gone = {row: {s.tokens_after == 0 for s in vtc.report(model).segments if s.row == row} for row in (0, 1)}
    assert sorted(gone.values(), key=str) == [{False}, {True}]


@torch.no_grad()
def test_atp_keeps_at_least_one_and_at_most_the_ceiling() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("ragged")
    left = []
    for options in ({"theta_r": 1.0, "theta_s": 1.0}, {"theta_r": 0.0}, {"theta_r": 0.5, "theta_s": 0.2}):
        with vtc.compressed(case.model, "atp", keep_ratio=0.75, **options) as model:
            model(**inputs)
            left.append([[k for _, _, k in stages] for stages in counts(model)])
    assert left[0] == [[1, 1, 1]] * 3
    assert left[1] == [[12, 12, 12]] * 3
    assert all(1 < stages[-1] <= stages[0] <= 12 for stages in left[2])


# --- what is read ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def spied(selector: type) -> Iterator[list[VisualContext]]:
    """Collects every context that methods of this class are asked about."""
    seen: list[VisualContext] = []
    original = selector.select  # type: ignore[attr-defined]

    def select(self: Any, ctx: VisualContext) -> Any:
        seen.append(ctx)
        return original(self, ctx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selector, "select", select)
        yield seen


def visual_columns(case: tiny.TinyCase, inputs: dict[str, Any]) -> Tensor:
    token = getattr(case.model.config, f"{case.family.modality}_token_id")
    return inputs["input_ids"] == token


@pytest.mark.parametrize("text", ["after", "all"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "gemma3", "paligemma"])
@torch.no_grad()
def test_modality_attention_is_that_of_the_layer_before(name: str, text: str) -> None:
    case = build(tiny.family(name), "eager")
    inputs = case.batch("ragged")
    attentions = case.model(**inputs, output_attentions=True).attentions
    case.model.set_attn_implementation("sdpa")
    with spied(AtpSelector) as atp, vtc.compressed(case.model, "atp", keep_ratio=0.5, layers=(2,), text=text):
        case.model(**inputs)
    options = {"exit_layer": 3, "pivot": "center", "text": text}
    with spied(ToDreSelector) as todre, vtc.compressed(case.model, "todre", keep_tokens=10**6, **options):
        case.model(**inputs)
    exits = [ctx for ctx in todre if ctx.site == vtc.DecoderLayer(3)]
    visual = visual_columns(case, inputs)
    mean = attentions[2].mean(1)
    segments = iter(zip(atp, exits, strict=True))
    for row in range(len(visual)):
        asking = inputs["attention_mask"][row].bool() & ~visual[row]
        if text == "after":
            asking &= visual[row].cumsum(0) > 0
        received = torch.stack([mean[row, asking].mean(0), mean[row, visual[row]].mean(0)])
        exchange = torch.stack([received[0, visual[row]].sum(), received[1, asking].sum()])
        columns = visual[row].nonzero()[:, 0]
        while len(columns):
            about, leaving = next(segments)
            torch.testing.assert_close(about[ModalityAttention], received[:, columns[: about.n]])
            torch.testing.assert_close(leaving[AttentionExchange], exchange)
            columns = columns[about.n :]


@torch.no_grad()
def test_logits_may_count_instead_of_attention_received() -> None:
    query, key = torch.randn(2, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    key, group = key[:, :2], torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    logits = (query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3).mean(1)
    expected = torch.stack([row[:, mask].mean(1) for row, mask in zip(logits, group, strict=True)])
    torch.testing.assert_close(mean_logits(query, key, 0.3, group), expected)

    case = build(tiny.family("llava"))
    inputs, chosen = case.batch("single"), []
    for self_score in ("received", "logits"):
        options = {"layers": (1,), "scale": "none", "theta_r": 0.05, "theta_s": 1.0, "self_score": self_score}
        with spied(AtpSelector) as seen, vtc.compressed(case.model, "atp", keep_tokens=99, **options) as model:
            model(**inputs)
            chosen.append(kept(vtc.report(model)))
    assert chosen[0] != chosen[1]
    assert bool((seen[0][ModalityAttention][1] < 0).any()), "logits are no probabilities"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "gemma3", "paligemma"])
@torch.no_grad()
def test_pagerank_is_that_of_the_layer_before(name: str) -> None:
    case = build(tiny.family(name), "eager")
    inputs = case.batch("ragged")
    # From probabilities back to logits: up to a constant per row, which a softmax does not see.
    logits = [attention.log() for attention in case.model(**inputs, output_attentions=True).attentions]
    case.model.set_attn_implementation("sdpa")
    walk = {"temperature": 0.5, "iterations": 3, "damping": 0.1}
    with spied(AimSelector) as seen, vtc.compressed(case.model, "aim", keep_tokens=10**6, l1=1, l2=3, **walk):
        case.model(**inputs)
    first = iter(ctx for ctx in seen if ctx.site == vtc.DecoderLayer(2))
    hidden = torch.finfo(torch.float32).min
    masked = logits[1].masked_fill(logits[1].isinf(), hidden)
    masked = masked.masked_fill(inputs["attention_mask"][:, None, :, None] == 0, hidden)
    expected = specification.pagerank_of_logits(masked, **walk)
    visual = visual_columns(case, inputs)
    for row in range(len(visual)):
        columns = visual[row].nonzero()[:, 0]
        while len(columns):
            ctx = next(first)
            torch.testing.assert_close(ctx[PageRank], expected[row, columns[: ctx.n]], rtol=1e-4, atol=1e-5)
            columns = columns[ctx.n :]


@torch.no_grad()
def test_context_relevance_and_entropy_are_those_of_the_tower() -> None:
    case = build(tiny.family("llava"), "eager")
    inputs = case.batch("ragged")
    pixels = inputs["pixel_values"]
    tower = case.model.model.vision_tower(pixels, output_attentions=True).attentions[2].mean(1)[:, 1:, 1:]
    case.model.set_attn_implementation("sdpa")
    options = {"t": 1.3, "alpha": 0.7, "mean": (0.4, 0.5, 0.6), "std": 0.2}
    with spied(VFlowOptSelector) as seen, vtc.compressed(case.model, "vflowopt", keep_ratio=0.5, **options):
        case.model(**inputs)
    patches = torch.nn.functional.unfold(pixels, 8, stride=8).transpose(1, 2).unflatten(2, (3, -1))
    entropy = kernels.patch_entropy(patches, torch.tensor([0.4, 0.5, 0.6]), torch.full((3,), 0.2))
    first = [ctx for ctx in seen if ctx.site == vtc.BeforeDecoder()]
    assert len(first) == len(pixels)
    for image, ctx in enumerate(first):
        torch.testing.assert_close(ctx[ContextRelevance], specification.context_relevance_of(tower[image], 1.3, "sum"))
        torch.testing.assert_close(ctx[PixelEntropy], entropy[image].softmax(0))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl_video", "internvl", "llava_onevision_video"])
@torch.no_grad()
def test_entropy_finds_the_noisy_corner(name: str) -> None:
    # One flat picture with noise in the patches of one known token: that token has the most entropy.
    case = build(tiny.family(name))
    inputs = case.batch("single")
    key = "pixel_values" if case.family.modality == "image" else "pixel_values_videos"
    pixels = torch.zeros_like(inputs[key])
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    if pixels.dim() == 2:  # four patches, one after the other, become a token
        pixels[4 * 6 : 4 * 7], token = noise[4 * 6 : 4 * 7], 6
    else:  # the second token of the second row
        patch = case.model.config.vision_config.patch_size
        patch = patch[0] if isinstance(patch, (list, tuple)) else patch
        merged = 2 * patch
        side = pixels.shape[-1] // merged
        pixels[..., merged : 2 * merged, merged : 2 * merged] = noise[..., merged : 2 * merged, merged : 2 * merged]
        token = side + 1
    with spied(VFlowOptSelector) as seen, vtc.compressed(case.model, "vflowopt", keep_ratio=0.5, alpha=1.0):
        case.model(**{**inputs, key: pixels})
    entropy = seen[0][PixelEntropy]
    per_frame = entropy.unflatten(0, (seen[0].grids[0][0], -1)) if pixels.dim() == 5 else entropy[None]
    assert per_frame.argmax(dim=1).tolist() == [token] * len(per_frame)


@torch.no_grad()
def test_tower_values_follow_tokens_into_the_decoder() -> None:
    case = build(tiny.family("llava_onevision"))
    with spied(VFlowOptSelector) as seen, vtc.compressed(case.model, "vflowopt", keep_ratio=0.3, cell=1.5) as model:
        case.model(**case.batch("single"))
        selections = [selection for _, selection in vtc.report(model).segments[0].selections]
    assert len(selections) == 3 == len(seen)
    for before, selection, after in zip(seen, selections, seen[1:], strict=False):
        assert torch.equal(after[ContextRelevance], before[ContextRelevance][selection.keep])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_say_why() -> None:
    siglip = build(tiny.family("llava_onevision")).model
    with pytest.raises(UnsupportedMethodError, match=r"todre needs cls_attention.*no \[CLS\] token"):
        vtc.compress(siglip, "todre", keep_ratio=0.5)
    assert "no [CLS] token" in vtc.list_methods(siglip)["todre"]
    assert "not on this model" not in vtc.list_methods(siglip)["aim"]
    hybrid = build(tiny.family("qwen3_5")).model
    for method in ("aim", "atp", "vflowopt"):
        with pytest.raises(UnsupportedMethodError, match=f"{method} removes tokens inside the decoder.*recurrent"):
            vtc.compress(hybrid, method, keep_ratio=0.5)
    with vtc.compressed(hybrid, "aim", keep_ratio=0.5, prune=False):
        assert vtc.is_compressed(hybrid)
    with pytest.raises(ConfigError, match="vflowopt shares its budget among decoder layers, so it needs keep_ratio"):
        vtc.compress(siglip, "vflowopt", keep_tokens=8)
    with pytest.raises(ConfigError, match="aim: l1=7, but the decoder has layers 0 to 3"):
        vtc.compress(siglip, "aim", keep_ratio=0.5, l1=7)


@torch.no_grad()
def test_composed_methods_may_read_one_signal_in_two_ways() -> None:
    # Each with its own threshold: both values are computed, and each method reads the one that it asked for.
    case = build(tiny.family("llava_onevision"))
    once = vtc.CompressionConfig("vflowopt", keep_ratio=0.9, options={"t": 3.0, "r1": 0.9, "r2": 1, "r3": 1})
    thrice = vtc.CompressionConfig("vflowopt", keep_ratio=0.5, options={"t": 1.0})
    seen = {}
    for configs in ([once], [thrice], [once, thrice]):
        with spied(VFlowOptSelector) as contexts, vtc.compressed(case.model, configs) as model:
            model(**case.batch("single"))
            selections = [selection for _, selection in vtc.report(model).segments[0].selections]
        seen[len(configs), configs[-1].options["t"]] = [ctx[ContextRelevance] for ctx in contexts]
    alone, composed = seen[1, 1.0][0], seen[2, 1.0]
    assert torch.equal(composed[0], seen[1, 3.0][0])
    assert torch.equal(composed[1], alone[selections[0].keep])


def test_refusals_name_the_stand_ins() -> None:
    siglip = build(tiny.family("llava_onevision")).model
    for method, option in (("vtc-cls", 'score_source="received"'), ("todre", 'pivot="random", "received" or "center"')):
        with pytest.raises(UnsupportedMethodError, match=f"has no .CLS. token; try {option}"):
            vtc.compress(siglip, method, keep_ratio=0.5)


@pytest.mark.parametrize("method", ["todre", "atp"])
@torch.no_grad()
def test_images_that_no_text_asks_about_are_refused(method: str) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    end = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero()[-1]) + 1
    silent = {**inputs, **{name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}}
    with vtc.compressed(case.model, method, keep_ratio=0.5) as model:
        with pytest.raises(InputError, match=rf'{method} needs .* no text behind its first image; .*text="all"'):
            model(**silent)
        model(**inputs)  # the refusal leaves nothing behind
    with vtc.compressed(case.model, method, keep_ratio=0.5, text="all") as model:
        model(**silent)
        assert vtc.report(model).visual_tokens_after > 0


@torch.no_grad()
def test_methods_know_whether_an_image_is_alone() -> None:
    case = build(tiny.family("llava_onevision"))
    with spied(VFlowOptSelector) as seen, vtc.compressed(case.model, "vflowopt", keep_ratio=0.3) as model:
        model(**case.batch("ragged"))  # one image in the first row, two in the second
        merged = [segment.selections[0][1].assign is not None for segment in vtc.report(model).segments]
    assert [ctx.other_visuals for ctx in seen if ctx.site == vtc.BeforeDecoder()] == [0, 1, 1]
    assert merged == [True, False, False]


@torch.no_grad()
def test_aim_reads_keys_of_images_alone() -> None:
    for name, keys in (("llava_onevision", True), ("llava_onevision_video", False)):
        case = build(tiny.family(name))
        with spied(AimSelector) as seen, vtc.compressed(case.model, "aim", keep_ratio=0.5) as model:
            model(**case.batch("single"))
        found = [{s.name for s in ctx.signals} for ctx in seen if ctx.site == vtc.BeforeDecoder()]
        assert found == [{"keys"} if keys else set()]


def test_composition_with_another_method() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("ragged")
    configs = [
        vtc.CompressionConfig("divprune", keep_ratio=0.75),
        vtc.CompressionConfig("aim", keep_ratio=0.5, options={"l1": 1, "l2": 3}),
    ]
    with vtc.compressed(case.model, configs) as model:
        generated(case, inputs)
        assert counts(model) == [[(None, 16, 12), (None, 12, 6), (2, 6, 3), (3, 3, 0)]] * 3
