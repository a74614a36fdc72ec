"""Methods and signals that a package outside `vtc` brings: nothing in `vtc` has to know them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests import tiny
from tests.invariants.matrix import build
from vtc import registry

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"


def code_of_the_page() -> str:
    """The block of docs/add-a-method.md with a method and a signal of its own."""
    (block,) = re.findall(r"```python\n((?:(?!```).)*class KeyNorm.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return block


@pytest.fixture(autouse=True)
def _registered_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry._SELECTORS, "_classes", dict(registry.selectors()))


@pytest.fixture
def page() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "outside"}
    exec(code_of_the_page(), names)
    return names


def test_the_page_needs_no_more_than_25_lines() -> None:
    lines = [line for line in code_of_the_page().splitlines() if line.strip()]
    assert len(lines) <= 25


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=str)
@torch.no_grad()
def test_the_page_works_in_every_family(family: tiny.Family, page: dict[str, Any]) -> None:
    case = build(family)
    inputs = case.batch("ragged")
    seen: list[vtc.VisualContext] = []
    score = page["LongKeysSelector"].score
    page["LongKeysSelector"].score = lambda self, ctx: seen.append(ctx) or score(self, ctx)
    with vtc.compressed(case.model, "long-keys", keep_ratio=0.5) as model:
        model(**inputs)
        segments = vtc.report(model).segments
    asked = list(seen)  # `vtc.select` asks again
    assert len(asked) == len(segments) > 1
    for ctx, segment in zip(asked, segments, strict=True):
        norms = ctx[page["KeyNorm"]]
        ((_, selection),) = segment.selections
        assert norms.shape == (ctx.n,)
        assert len(norms.unique()) > 1
        assert selection.k == max(1, round(0.5 * ctx.n))
        assert norms[selection.keep].min() >= norms[~selection.mask].max()
        chosen = vtc.select("long-keys", signals={page["KeyNorm"]: norms}, keep_tokens=selection.k)
        assert torch.equal(chosen.keep, selection.keep)
    assert not vtc.is_compressed(case.model)


def test_norms_are_those_of_the_tower(page: dict[str, Any]) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    attention = [m for m in case.model.model.vision_tower.modules() if hasattr(m, "k_proj")][2]
    keys: list[torch.Tensor] = []
    attention.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    seen: list[torch.Tensor] = []
    page["LongKeysSelector"].score = lambda self, ctx: seen.append(ctx[page["KeyNorm"]]) or seen[-1]
    with torch.no_grad(), vtc.compressed(case.model, "long-keys", keep_ratio=0.5) as model:
        model(**inputs)
    heads = case.model.config.vision_config.num_attention_heads
    expected = keys[0].unflatten(-1, (heads, -1)).norm(dim=-1).mean(dim=-1)[0, 1:]  # without [CLS]
    torch.testing.assert_close(seen[0], expected)


# --- a signal of every other observation -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Hidden(vtc.VisionSignal):
    name = "hidden"
    reads = vtc.VisionHidden

    def compute(self, raw: vtc.VisionHidden) -> torch.Tensor:
        return raw.hidden.float().norm(dim=-1)


@dataclass(frozen=True)
class Brightness(vtc.Signal):
    name = "brightness"
    reads = vtc.PatchPixels

    def compute(self, raw: vtc.PatchPixels) -> torch.Tensor:
        if raw.size is None:
            patches = [crop.flatten(1).mean(dim=1) for crop in raw.crops]
        else:
            h, w = raw.size
            patches = [crop.unfold(1, h, h).unfold(2, w, w).mean(dim=(0, 3, 4)).flatten() for crop in raw.crops]
        return torch.cat(patches)[None] if raw.packed else torch.stack(patches)


@dataclass(frozen=True)
class Row(vtc.Signal):
    name = "row"
    reads = vtc.TokenGrids

    def compute(self, raw: vtc.TokenGrids) -> torch.Tensor:
        return raw.origin()[:, 2].float()


@dataclass(frozen=True)
class TextSimilarity(vtc.Signal):
    name = "text_similarity"
    reads = vtc.PromptText
    axes = ("D",)
    per_token = False

    def compute(self, raw: vtc.PromptText) -> torch.Tensor:
        assert raw.ids.shape == raw.embeddings.shape[:1]
        return raw.embeddings.float().mean(dim=0)


@dataclass(frozen=True)
class FromText(vtc.Signal):
    name = "from_text"
    reads = vtc.DecoderAttention

    def compute(self, raw: vtc.DecoderAttention) -> torch.Tensor:
        assert not bool((raw.text & raw.visual).any())
        keys = raw.keys[:, :, raw.key_length - raw.queries.shape[2] : raw.key_length].float()
        return keys.norm(dim=-1).mean(dim=1)


@dataclass(frozen=True)
class Entering(vtc.Signal):
    name = "entering"
    reads = vtc.DecoderHidden

    def compute(self, raw: vtc.DecoderHidden) -> torch.Tensor:
        return raw.hidden.float().norm(dim=-1)


def method_of(signal: vtc.Signal) -> type[vtc.Selector]:
    """A method that ranks by a signal, or by the similarity of the features to one that is not per token."""

    @vtc.register_selector
    @dataclass(frozen=True)
    class OutsideSelector(vtc.ScoreSelector):
        name = f"by-{signal.name.replace('_', '-')}"
        paper = "tests"
        requires = (signal,)
        sites = (vtc.VisionLayer, vtc.BeforeDecoder, vtc.DecoderLayer)
        seen = []  # noqa: RUF012

        def score(self, ctx: vtc.VisualContext) -> torch.Tensor:
            value = ctx[type(signal)]
            type(self).seen.append(value)
            return value if signal.per_token else ctx.features.float() @ value

    return OutsideSelector


def cases() -> list[Any]:
    signals: tuple[tuple[vtc.Signal, str | None], ...] = (
        (Hidden(), None),
        (Hidden((0,)), "decoder:2"),
        (Brightness(), None),
        (Row(), "decoder:3"),
        (TextSimilarity(), None),
        (TextSimilarity(), "decoder:2"),
        (FromText(), "decoder:2"),
        (Entering(), "decoder:1"),
    )
    return [
        pytest.param(signal, at, name, id=f"{signal.name}-{name}-{at}")
        for signal, at in signals
        for name in ("llava", "qwen2_5_vl", "internvl")
    ]


@pytest.mark.parametrize(("signal", "at", "name"), cases())
@torch.no_grad()
def test_a_signal_of_every_observation(signal: vtc.Signal, at: str | None, name: str) -> None:
    case = build(tiny.family(name))
    selector = method_of(signal)
    with vtc.compressed(case.model, selector.name, keep_ratio=0.5, at=at) as model:
        model(**case.batch("ragged"))
        segments = vtc.report(model).segments
    assert len(selector.seen) == len(segments)
    for value, segment in zip(selector.seen, segments, strict=True):
        ((site, selection),) = segment.selections
        assert str(site) == (at or "decoder")
        assert value.shape[0] == (selection.n if signal.per_token else 64)
        if signal.per_token:
            assert value[selection.keep].min() >= value[~selection.mask].max()


@pytest.mark.parametrize(
    ("signal", "at", "match"),
    [
        (FromText(), None, "by-from-text needs from_text.*it is read inside the decoder, not at 'decoder'"),
        (TextSimilarity(), "vision:1", "by-text-similarity needs text_similarity.*not at 'vision:1'"),
        (Hidden((9,)), None, "hidden: layer 9 was asked for, but the tower has layers 0 to 3"),
    ],
)
def test_what_cannot_be_read_there_is_refused(signal: vtc.Signal, at: str | None, match: str) -> None:
    model = build(tiny.family("llava")).model
    selector = method_of(signal)
    with pytest.raises(vtc.VtcError, match=match):
        vtc.compress(model, selector.name, keep_ratio=0.5, at=at)
    assert not vtc.is_compressed(model)
