"""Invariant 9: patches that merge inside the tower are as if the untouched tower were told so.

The reference runs every layer of the untouched tower on all patches. On entering a layer where cells merge it writes
the mean over those that stay, hides the others as keys, and adds the logarithm of the sizes to the logits.
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
from tests.invariants.matrix import borrowed, build, sharp_borrowed
from tests.invariants.test_8_towers import EXACT, FAMILIES, config, seen_towers
from vtc.budget import resolve_budget
from vtc.engine.in_tower import TowerPass
from vtc.engine.install import adapter_for
from vtc.engine.plan import make_plan
from vtc.errors import UnsupportedMethodError, UnsupportedModelError


def into_the_next(n: int, every: int) -> list[int]:
    """Slot of every token, where of `every` neighbours all flow into the last, and what is left over stays."""
    groups = n // every
    return [i // every if i < groups * every else groups + i - groups * every for i in range(n)]


@dataclasses.dataclass(frozen=True)
class Neighbours(vtc.Selector):
    """Merges every so many neighbours into the last of them."""

    name, paper = "neighbours", "a test"
    sites = (vtc.VisionLayer, vtc.BeforeDecoder)
    adaptive = True
    every: int = 2

    def stages(self, shape: Any = None, keep_ratio: float | None = None) -> tuple[vtc.Stage, ...]:
        return (vtc.Stage(action=vtc.Action.MERGE),)

    def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
        slots = torch.tensor(into_the_next(ctx.n, self.every))
        keep = torch.tensor([i for i in range(ctx.n) if i == ctx.n - 1 or slots[i] != slots[i + 1]])
        return vtc.Selection(ctx.n, keep, slots)


@pytest.fixture(autouse=True)
def _neighbours() -> None:
    vtc.register_selector(Neighbours)


@contextlib.contextmanager
def merged(model: Any, modality: str, tower: TowerPass, merges: dict[int, int]) -> Iterator[None]:
    """Merge `every` neighbouring cells of each unit on entering layers, `merges`, of the untouched tower."""
    adapter = adapter_for(model)
    attentions = {module: layer for layer, module in enumerate(adapter.tower_attentions(modality))}
    cells: list[list[int]] = []
    sizes: list[torch.Tensor] = []
    bias: list[torch.Tensor] = []  # (C, T) of the current layer
    begun: dict[int, int] = {}

    def begin(*_: Any) -> None:
        cells[:] = [list(range(len(unit.cells))) for unit in tower.units]
        sizes[:] = [torch.ones(len(unit.cells), dtype=torch.float64) for unit in tower.units]
        bias.clear()
        begun.clear()

    def enter(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            rows = (hidden[None] if hidden.dim() == 2 else hidden).clone()
            if not bias:
                bias.append(torch.zeros(rows.shape[:2], dtype=torch.float64))
            for number, unit in enumerate(tower.units):
                slots = into_the_next(len(cells[number]), merges[layer])
                kept = []
                for slot in range(max(slots) + 1):
                    members = [cell for cell, own in zip(cells[number], slots, strict=True) if own == slot]
                    weight = sizes[number][members]
                    share = (weight.float() / weight.float().sum())[:, None].to(rows)  # as of a Selection
                    for places in tower.prefix + unit.cells[members].T:  # the same place in every cell
                        mean = (rows[unit.crop, places] * share).sum(dim=0)
                        rows[unit.crop, places[-1]] = mean
                        bias[0][unit.crop, places[:-1]] = -torch.inf
                        bias[0][unit.crop, places[-1]] = weight.sum().log()
                    sizes[number][members[-1]] = weight.sum()
                    kept.append(members[-1])
                cells[number] = kept
            rows = rows[0] if hidden.dim() == 2 else rows
            return ((rows, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": rows})

        return hook

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        layer = attentions.get(module)
        if bias and layer is not None:
            start, length = begun.get(layer, 0), key.shape[2]
            begun[layer] = start + length
            added = bias[0][:, None, None, start : start + length].expand(-1, 1, length, -1).clone()
            own = torch.eye(length, dtype=torch.bool) & added.isinf()
            added = added.masked_fill(own, 0.0)  # a patch that is gone still sees itself
            if attention_mask is not None:
                theirs = attention_mask
                if theirs.dtype == torch.bool:
                    theirs = torch.zeros_like(theirs, dtype=query.dtype).masked_fill(~theirs, -torch.inf)
                added = (added + theirs).masked_fill(own, 0.0)
            attention_mask = added.to(query.dtype)
        return original(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    handles = [
        adapter.tower_blocks(modality)[layer].register_forward_pre_hook(enter(layer), with_kwargs=True)
        for layer in merges
    ]
    handles.append(adapter.tower(modality).register_forward_pre_hook(begin))
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
        for handle in handles:
            handle.remove()


MERGES = {"two at layer 1": {1: 2}, "three, then two": {1: 3, 2: 2}, "patch embeddings": {0: 2}}


@pytest.mark.parametrize("merges", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("family", EXACT, ids=str)
@torch.no_grad()
def test_merging_equals_the_untouched_tower(family: tiny.Family, merges: dict[int, int]) -> None:
    case = sharp_borrowed(family)
    last = adapter_for(case.model).feature_layer(family.modality, {})
    merges = {layer: every for layer, every in merges.items() if layer <= last}  # later ones make no features
    inputs = case.batch("two_images")
    stages = [config("neighbours", f"vision:{layer}", every=every) for layer, every in merges.items()]
    with vtc.compressed(case.model, stages) as model, seen_towers() as towers:
        ours = model(**inputs).logits
        report = vtc.report(model)
    assert all(segment.tokens_after < segment.tokens_before for segment in report.segments)
    with merged(case.model, family.modality, towers[0], merges):
        expected = reference.Reference.of(case.model, inputs, report)
        theirs = expected.prefill().logits
    assert reference.max_error(ours[expected.visible], theirs[expected.visible]) <= 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_merging_equal_patches_changes_nothing(attention: str) -> None:
    """The exact case of merging: a patch that counts n times is n equal patches."""
    case = build(tiny.family("llava"), attention)
    tower = adapter_for(case.model).tower("image")
    tower.embeddings.position_embedding.weight.zero_()
    inputs = case.batch("single")
    pixels = inputs["pixel_values"]
    size = tower.config.patch_size
    inputs["pixel_values"] = pixels[..., :size, :size].repeat(1, 1, *(side // size for side in pixels.shape[2:]))
    plain = reference.merged_embeddings(case.model, inputs)
    with vtc.compressed(case.model, "tome", keep_ratio=0.25) as model:
        ours = reference.merged_embeddings(model, inputs)
    assert ours.shape[1] < plain.shape[1]
    visual = plain[0][inputs["input_ids"][0] == case.model.config.image_token_id]
    assert reference.max_error(visual, visual[:1].expand_as(visual)) <= 1e-6  # all are equal, and stay what they were
    assert all(float((row - ours[0]).abs().amax(dim=1).min()) <= 1e-5 for row in visual)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_tome_merges_down_to_the_budget(family: tiny.Family) -> None:
    case = borrowed(family)
    inputs, plain = case.batch("two_images"), case.plain("two_images").logits
    with vtc.compressed(case.model, "tome", keep_ratio=1.0) as model:
        assert torch.equal(model(**inputs).logits, plain)
    with vtc.compressed(case.model, "tome", keep_ratio=0.5) as model:
        model(**inputs)
        for segment in vtc.report(model).segments:
            patches = segment.tokens_before - segment.structural
            assert segment.tokens_after - segment.structural == resolve_budget(patches, 0.5)
    assert torch.equal(case.model(**inputs).logits, plain)


def test_flash_attention_is_refused() -> None:
    case = build(tiny.family("llava"))
    tower = adapter_for(case.model).tower("image")
    tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedMethodError, match="flash attention takes no such weights"):
        vtc.compress(case.model, "tome", keep_ratio=0.5)
    tower.config._attn_implementation = "sdpa"
    plan = make_plan([vtc.CompressionConfig("tome", keep_ratio=0.5)], adapter_for(case.model))
    with pytest.raises(UnsupportedModelError, match="flash attention takes no such weights"):
        TowerPass([], plan.in_tower, 1, "image", lambda stage: {}, flash=True)


def test_pixels_do_not_merge() -> None:
    case = build(tiny.family("llava"))
    with pytest.raises(UnsupportedMethodError, match="cannot work at 'pixels'"):
        vtc.compress(case.model, "neighbours", keep_ratio=0.5, at="pixels")
