"""The methods of the invariant matrix, and which of them apply to which family."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers.generation import utils as generation_utils

import vtc
from tests import shared, tiny
from vtc.config import CompressionConfig

ATTENTIONS = ("sdpa", "eager")

REPRESENTATIVES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl")
"""Families for the modes of generate(): 2-D positions, M-RoPE, deepstack, tiles."""

FEW = ("resize", "divprune at vision:1", "flowcut received", "divprune", "fastv", "divprune+fastv", "vtc")
"""Methods that are tried in families like another: at the pixels, in the tower, before the decoder, in it, merging."""

VIDEO_REPRESENTATIVES = ("llava_next_video", "qwen2_5_vl_video")

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}
"""Bounds of logits that reach 10: in float32 the rounding of sums taken in another order, measured at up to 1.5e-5.

In float64 nearly all of that is gone, but for transformers' own norms and rotations in float32, so that invariants can
be stated twenty times tighter. Eager attention is tested in float32: with padding its float64 masks overflow to NaN
in the float32 softmax, compressed or not.
"""

HYBRID_TOLERANCE = 1e-3
"""transformers' gated delta rule works in float32 chunks whose borders move with padding: the untouched model's padded
batches differ from their rows by up to 2.4e-4, compressed ones, whose padding has other lengths, by up to 4.7e-4."""

PRECISION = {"sdpa": torch.float64, "eager": torch.float32}


PREFILLS_IN_CHUNKS = hasattr(generation_utils, "_slice_mm_encoder_output")
"""Whether this release of transformers can split a prompt with images; earlier ones feed the chunks no features at all,
and in a later turn read token types from the start of the conversation."""


@dataclass(frozen=True)
class Method:
    """One line of the method matrix: the stages of a compression."""

    name: str
    stages: tuple[CompressionConfig, ...]
    needs_cls: bool = False
    decoder: bool = False
    drawn: bool = False
    """Whether the choice is random, and so may depend on where in its row an image stands."""
    merges: bool = False
    """Whether kept tokens take up others, so that masking those is not the same as dropping them."""
    video: bool = False
    """Whether it compares frames."""
    tower: bool = False
    """Whether patches leave inside the vision tower, which `test_8_towers.py` compares with masking them there."""
    any_size: bool = False
    """Whether the tower has to take pictures of any size."""
    cache: bool = False
    """Whether entries leave the caches, which `tests/engine/test_eviction.py` compares with masking them there."""
    by_ratio: bool = True
    """Whether every configuration is one stage that keeps its ratio of what enters it."""
    reads_text: bool = False
    """Whether the text of the prompt counts."""
    everywhere: bool = True
    """Whether it is tried in all families and attentions, which costs ten seconds.

    Else in `REPRESENTATIVES`, for videos `VIDEO_REPRESENTATIVES`, and sdpa: enough where a method differs from others
    only in the tensors that its selector reads and returns.
    """

    def applies_to(self, family: tiny.Family, attention: str = "sdpa") -> bool:
        enough = VIDEO_REPRESENTATIVES if self.video else REPRESENTATIVES
        if family.like is not None and (self.name not in FEW or attention != "sdpa"):
            return False
        if not self.everywhere and (family.name not in enough or attention != "sdpa"):
            return False
        if self.video and family.modality != "video":
            return False
        if self.any_size and not family.any_size:
            return False
        if self.tower and family.name == "llava_onevision_video":  # whose features are interpolated across patches
            return False
        return (family.cls or not self.needs_cls) and not (family.hybrid and self.decoder)

    def at(self, keep_ratio: float) -> Method:
        """The same method with one keep ratio for all stages."""
        stages = tuple(dataclasses.replace(stage, keep_ratio=keep_ratio, keep_tokens=None) for stage in self.stages)
        return dataclasses.replace(self, stages=stages)

    def compress(self, model: Any) -> Any:
        return vtc.compress(model, list(self.stages) if len(self.stages) > 1 else self.stages[0])

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """The model, compressed while entered."""
        self.compress(model)
        try:
            yield model
        finally:
            vtc.restore(model)

    def __str__(self) -> str:
        return self.name


def _one(method: str, keep_ratio: float, **options: Any) -> tuple[CompressionConfig, ...]:
    return (CompressionConfig(method, keep_ratio=keep_ratio, options=options),)


METHODS: tuple[Method, ...] = (
    Method("random", _one("random", 0.5), drawn=True, everywhere=False),
    Method("uniform", _one("uniform", 0.5)),
    Method("pool", _one("pool", 0.3), merges=True, everywhere=False),
    Method(
        "pool at decoder:2",
        (CompressionConfig("pool", keep_ratio=0.4, at="decoder:2"),),
        decoder=True,
        merges=True,
        everywhere=False,
    ),
    Method("resize", _one("resize", 0.5), any_size=True, tower=True, by_ratio=False),
    Method("uniform at decoder:2", (CompressionConfig("uniform", keep_ratio=0.5, at="decoder:2"),), decoder=True),
    Method("divprune at vision:1", (CompressionConfig("divprune", keep_ratio=0.5, at="vision:1"),), tower=True),
    Method("tome", _one("tome", 0.5), merges=True, tower=True, by_ratio=False),
    # Random pixels repeat nowhere; by their means about half of them do.
    Method("pixelprune", _one("pixelprune", 0.8, similarity="mean", tau=1.13), tower=True, by_ratio=False),
    Method("flowcut", _one("flowcut", 0.3, layers=(1,)), needs_cls=True, tower=True, by_ratio=False, everywhere=False),
    Method("flowcut received", _one("flowcut", 0.3, score_source="received"), tower=True, by_ratio=False),
    Method(
        "as-vit",
        _one("adaptive-sparse-vit", 0.8, thresholds=1.0),
        needs_cls=True,
        tower=True,
        by_ratio=False,
        everywhere=False,
    ),
    # The tiny towers have four layers, of which the third makes the features.
    Method("vtc-cls", _one("vtc-cls", 0.5, start_layer=1), needs_cls=True),
    Method("divprune", _one("divprune", 0.4)),
    Method("fastv", _one("fastv", 0.5, layer=2), decoder=True),
    Method("divprune+fastv", _one("divprune", 0.6) + _one("fastv", 0.5, layer=2), decoder=True),
    Method("vflowopt", _one("vflowopt", 0.4, t=1.2, cell=2.0), decoder=True, merges=True, by_ratio=False),
    Method("todre", _one("todre", 0.5, pivot="center", tau=1.0, exit_layer=2), decoder=True, by_ratio=False),
    Method("atp", _one("atp", 0.7), decoder=True, by_ratio=False, everywhere=False),
    Method("aim", _one("aim", 0.4), decoder=True, merges=True, by_ratio=False),
    Method("vtc", _one("vtc", 0.4), merges=True),
    Method("vtc by text", _one("vtc", 0.4, relevance_weight=0.5), merges=True, reads_text=True, everywhere=False),
    Method(
        "cdpruner",
        _one("cdpruner", 0.5, relevance_weight=0.5, text="after"),
        reads_text=True,
        everywhere=False,
    ),
    Method("rediprune", _one("rediprune", 0.5), reads_text=True, everywhere=False),
    Method("mmtok", _one("mmtok", 0.5), reads_text=True, everywhere=False),
    Method("eadp", _one("eadp", 0.5), reads_text=True, everywhere=False),
    Method("visionzip", _one("visionzip", 0.5, contextual=0.4), needs_cls=True, merges=True, everywhere=False),
    Method("fastervlm", _one("fastervlm", 0.5), needs_cls=True, everywhere=False),
    Method("vispruner", _one("vispruner", 0.5), needs_cls=True, everywhere=False),
    Method("dart", _one("dart", 0.5, image_pivots=2, text_pivots=2), reads_text=True, everywhere=False),
    Method("dart at layer 2", _one("dart", 0.5, layer=2), decoder=True, everywhere=False),
    Method("sparsevlm", _one("sparsevlm", 0.5), decoder=True, merges=True, reads_text=True, by_ratio=False),
    Method(
        "sparsevlm plain",
        _one("sparsevlm", 0.5, recycle=False, heads=2),
        decoder=True,
        reads_text=True,
        by_ratio=False,
        everywhere=False,
    ),
    Method("pyramiddrop", _one("pyramiddrop", 0.3), decoder=True, by_ratio=False),
    Method("scope", _one("scope", 0.5), needs_cls=True, everywhere=False),
    Method("holov", _one("holov", 0.5, crops=3, score_source="received"), everywhere=False),
    Method("hiprune", _one("hiprune", 0.5, alpha=0.6), everywhere=False),
    Method("hiprune with text", _one("hiprune", 0.5, text=0.3), reads_text=True, everywhere=False),
    Method(
        "prumerge", _one("prumerge", 0.5, count="budget", neighbours=3), merges=True, needs_cls=True, everywhere=False
    ),
    Method("prumerge-plus", _one("prumerge-plus", 0.5), merges=True, needs_cls=True, by_ratio=False, everywhere=False),
    Method(
        "vscan",
        _one("vscan", 0.5, score_source="received", window=2),
        decoder=True,
        merges=True,
        by_ratio=False,
        everywhere=False,
    ),
    Method("gemfilter", _one("gemfilter", 0.5, layer=1), everywhere=False, reads_text=True),
    # Stages of a tiny decoder would be in layers 1, 2 and 3.
    Method("sliminfer", _one("sliminfer", 0.3, block=2, window=4), decoder=True, by_ratio=False, everywhere=False),
    Method("snapkv", _one("snapkv", 0.5, window=4), decoder=True, cache=True, everywhere=False),
    Method("prefixkv", _one("prefixkv", 0.5, scope="all"), decoder=True, cache=True, by_ratio=False, everywhere=False),
    Method("defensivekv", _one("defensivekv", 0.5, window=4), decoder=True, cache=True, everywhere=False),
    Method("triattention", _one("triattention", 0.5), decoder=True, cache=True, everywhere=False),
    Method("evs", _one("evs", 0.6), video=True),
    Method("vidcom2", _one("vidcom2", 0.5), video=True, everywhere=False),
    Method("dycoke", _one("dycoke", 0.6), video=True, everywhere=False),
    Method("fastvid", _one("fastvid", 0.5, tau=-1.0, segments=1), merges=True, video=True, everywhere=False),
    # Random frames have little in common: no place would be static.
    Method("prunevid", _one("prunevid", 0.5, tau=-0.5), merges=True, video=True, everywhere=False),
    Method(
        "flashvid", _one("flashvid", 0.5, tau=-1.0, segments=1, link=0.0), merges=True, video=True, everywhere=False
    ),
    Method("holitom", _one("holitom", 0.5, tau=-0.5), merges=True, video=True, everywhere=False),
)
DROPPING = tuple(m for m in METHODS if not m.merges and not m.tower and not m.cache)


def method(name: str) -> Method:
    return next(m for m in METHODS if m.name == name)


def over_matrix(
    methods: tuple[Method, ...] = METHODS,
    families: tuple[tiny.Family, ...] = tiny.FAMILIES,
    attentions: tuple[str, ...] = ATTENTIONS,
) -> Callable[[Any], Any]:
    """Parametrise a test over (family, method, attention), leaving out what does not apply."""
    cases = [
        pytest.param(family, m, attention, id=f"{family}-{m}-{attention}")
        for family in families
        for m in methods
        for attention in attentions
        if m.applies_to(family, attention)
    ]
    return pytest.mark.parametrize(("family", "method", "attention"), cases)


def over_representatives(*names: str) -> Callable[[Any], Any]:
    """Parametrise a test over (family, method): the representative families and the named methods."""
    cases = [
        pytest.param(tiny.family(f), method(m), id=f"{f}-{m}")
        for f in REPRESENTATIVES
        for m in names
        if method(m).applies_to(tiny.family(f))
    ]
    return pytest.mark.parametrize(("family", "method"), cases)


def build(
    family: tiny.Family, attention: str = "sdpa", *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tiny.TinyCase:
    """A fresh tiny model with this attention implementation everywhere."""
    case = tiny.build(family.name, seed=seed, dtype=dtype)
    case.model.set_attn_implementation(attention)
    return case


def sharp(family: tiny.Family, attention: str = "sdpa") -> tiny.TinyCase:
    """A fresh tiny model in the precision in which this attention can be held to the tightest bound."""
    return build(family, attention, dtype=PRECISION[attention])


def borrowed(family: tiny.Family, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> shared.SharedCase:
    """A model that other tests use as well: the test restores it, and leaves it as it was."""
    return shared.case(family.name, attention, dtype)


def sharp_borrowed(family: tiny.Family, attention: str = "sdpa") -> shared.SharedCase:
    """The same in the precision of `sharp`."""
    return shared.case(family.name, attention, PRECISION[attention])


def tolerance(case: tiny.TinyCase, method: Method | None = None) -> float:
    if case.family.hybrid:
        return HYBRID_TOLERANCE
    # Tokens are merged in float32, whatever the model's precision.
    rounded = case.family.routed or (method is not None and method.merges)
    return TOLERANCE[torch.float32 if rounded else case.model.dtype]
