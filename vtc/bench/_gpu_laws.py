"""The invariants of compression on tiny models of five families, on whatever device and attention implementation.

Unlike the project's tests, which hold every method to them on a CPU, this asks what only a device can answer: kernels
that choose, attention implementations that exist there alone, and decode steps that are compiled into CUDA graphs.
"""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import vtc
from vtc import kernels
from vtc.bench._models import build, prompt
from vtc.bench._whole_models import WHOLE_MODELS, WholeModel, tiny
from vtc.core.context import VisualContext
from vtc.core.selection import Selection
from vtc.engine.cache import CACHE
from vtc.registry import get_selector

__all__ = ["measure"]

_DROPPING = "divprune"  # whose choices neither merge nor read attention
_DEFAULT = "vtc"
_KEEP = 0.25
_TEXT_TOKENS = 12
_NEW_TOKENS = 8
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of logits relative to the largest of them."""

Inputs = dict[str, Tensor]


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # patches are embedded in it by default
@torch.no_grad()
def measure(case: str, device: str, small: bool) -> dict[str, Any]:
    """Return what each law measured, and whether it holds, for "family, attention" or "family, static cache"."""
    name, how = case.split(", ")
    shape = tiny(WHOLE_MODELS[name])
    missing = _missing(how)
    if missing:
        return {"skipped": missing}
    static = how == "static cache"
    dtype = torch.bfloat16 if how.startswith("flash") else torch.float32
    model = build(shape, shape.full_depth, dtype, device, attention="sdpa" if static else how)
    found = _static(model, shape) if static else _all(model, shape)
    return {"laws": [{"law": law, "holds": holds, "measured": measured} for law, holds, measured in found]}


def _missing(how: str) -> str | None:
    """Return why an attention implementation cannot run here."""
    from transformers.utils import import_utils

    asked = {"flash_attention_2": "is_flash_attn_2_available", "flash_attention_3": "is_flash_attn_3_available"}
    if how not in asked:
        return None
    available = getattr(import_utils, asked[how], None)
    return None if available is not None and available() else f"{how} is not installed, or has no GPU here"


Law = tuple[str, bool, str]
"""Its words, whether it holds, and the measured value."""


def _all(model: Any, shape: WholeModel) -> list[Law]:
    inputs = prompt(shape, model, shape.visual_tokens, _TEXT_TOKENS)
    tolerance = _TOLERANCES[model.dtype]
    plain = _logits(model, inputs)
    laws: list[Law] = []
    for method in (_DEFAULT, _DROPPING):
        with vtc.compressed(model, method, keep_ratio=1.0):
            same = torch.equal(_logits(model, inputs), plain)
        laws.append((f"{method} keeping all changes nothing", same, "identical" if same else "differs"))
    with vtc.compressed(model, _DROPPING, keep_ratio=_KEEP):
        ours = _logits(model, inputs)
        kept = vtc.report(model).segments[0].kept
    error = _difference(ours, _masked(model, inputs, [kept]))
    laws.append(("dropped is as if masked", error <= tolerance, f"{error:.0e}"))
    other = prompt(shape, model, shape.visual_tokens, _TEXT_TOKENS, seed=2)
    both = {name: torch.cat([inputs[name], other[name]]) for name in inputs}
    for method in (_DEFAULT, _DROPPING):
        with vtc.compressed(model, method, keep_ratio=_KEEP):
            alone = [_logits(model, one) for one in (inputs, other)]
            error = _difference(_logits(model, both), torch.cat(alone))
        laws.append((f"{method} on a batch equals its rows", error <= tolerance, f"{error:.0e}"))
        if model.device.type == "cuda":
            waits = _waits(model, method, inputs)
            laws.append((f"{method} waits for the device once", waits == 1, f"{waits} times"))
        share = _shared(model, method, inputs)
        laws.append((f"{method} by kernels chooses as in PyTorch", share >= 0.98, f"{100 * share:.0f} %"))
    back = torch.equal(_logits(model, inputs), plain)
    laws.append(("restored", back and not vtc.is_compressed(model), "identical" if back else "differs"))
    return laws


def _static(model: Any, shape: WholeModel) -> list[Law]:
    """A static cache, whose decode steps transformers compiles into CUDA graphs where there is a GPU."""
    from torch._dynamo.utils import counters

    inputs = prompt(shape, model, shape.visual_tokens, _TEXT_TOKENS)
    laws: list[Law] = []
    for method in (_DEFAULT, _DROPPING):
        with vtc.compressed(model, method, keep_ratio=_KEEP):
            dynamic = _generate(model, inputs)
            counters.clear()
            static = _generate(model, inputs, cache_implementation="static")
        same = torch.equal(dynamic, static)
        graphs = counters["stats"].get("unique_graphs", 0)
        skips = counters["inductor"].get("cudagraph_skips", 0)
        words = f"{graphs} compiled graphs, {skips} not as CUDA graphs"
        laws.append((f"{method} on a static cache says the same", same, words if same else f"differs, {words}"))
        if model.device.type == "cuda":
            laws.append((f"{method} decodes by CUDA graphs", graphs > 0 and skips == 0, words))
    return laws


def _generate(model: Any, inputs: Inputs, **more: Any) -> Tensor:
    tokens: Tensor = model.generate(
        **inputs, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False, **more
    )
    return tokens


def _logits(model: Any, inputs: Inputs) -> Tensor:
    """Logits (B, V) of the last position."""
    logits: Tensor = model(**inputs, use_cache=False).logits[:, -1]
    return logits


def _masked(model: Any, inputs: Inputs, kept: list[Tensor]) -> Tensor:
    """Logits of the untouched model whose decoder does not see what was dropped of each row's picture."""
    seen: list[dict[str, Any]] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    mask = inputs["attention_mask"].clone()
    for row, places in enumerate(kept):
        columns = (inputs["input_ids"][row] == model.config.image_token_id).nonzero()[:, 0]
        mask[row, columns] = 0
        mask[row, columns[places.to(columns.device)]] = 1
    hidden = decoder(**{**seen[0], "attention_mask": mask, CACHE: None, "use_cache": False}).last_hidden_state
    logits: Tensor = model.lm_head(hidden[:, -1])
    return logits


def _shared(model: Any, method: str, inputs: Inputs) -> float:
    """Share of the tokens kept by kernels that PyTorch keeps, too."""
    kept = []
    for choice in ("auto", "torch"):
        with kernels.use(choice), vtc.compressed(model, method, keep_ratio=_KEEP):
            _logits(model, inputs)
            kept.append(set(vtc.report(model).segments[0].kept.tolist()))
    return len(kept[0] & kept[1]) / len(kept[1])


def _waits(model: Any, method: str, inputs: Inputs) -> int:
    """How often a selection makes the host wait, as CUDA tells it."""
    counts: list[int] = []
    kind = type(get_selector(method))
    original = kind.select

    def counted(self: Any, context: VisualContext) -> Selection:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                return original(self, context)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchroniz" in str(warning.message) for warning in told))

    with vtc.compressed(model, method, keep_ratio=_KEEP), mock.patch.object(kind, "select", counted):
        for _ in range(2):  # kernels are compiled in the first
            _logits(model, inputs)
    return counts[-1]


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where either is not finite."""
    largest = float((a.double() - b.double()).abs().max() / b.double().abs().max())
    return largest if largest < float("inf") else float("inf")
