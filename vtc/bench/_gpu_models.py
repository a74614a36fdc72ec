"""Time to the first token, decode rate and memory at the shapes of 7B checkpoints, with random weights."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch

import vtc
from vtc.bench import _tower
from vtc.bench._cache import decode
from vtc.bench._models import build, packed_length, plain_prompt, prompt
from vtc.bench._prefill import encode, prefill
from vtc.bench._whole_models import WHOLE_MODELS, WholeModel, tiny
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import Case, interleave

__all__ = ["KEEPS", "METHOD", "measure"]

METHOD = "vtc"
KEEPS = (1.0, 0.25, 0.1)
_TEXT_TOKENS = 64
_STEPS = {True: 2, False: 16}
_REPEATS = {True: 1, False: 3}

_built: dict[str, Any] = {}
"""The last model by its name: both batches of a shape use the same one, and two do not fit side by side."""


def measure(case: str, device: str, small: bool) -> dict[str, Any]:
    """Return one row of figures per fraction kept, for "shape, batch rows"."""
    name, batch = case.split(", batch ")
    rows = int(batch)
    shape = tiny(WHOLE_MODELS[name]) if small else WHOLE_MODELS[name]
    if name not in _built:
        _built.clear()
        gc.collect()  # modules and hooks refer to each other in circles; a second model need not fit beside the first
        _built[name] = build(shape, shape.full_depth, torch.float32 if small else torch.bfloat16, device)
    model = _built[name]
    one = prompt(shape, model, shape.visual_tokens, _TEXT_TOKENS)
    inputs = {key: torch.cat([value] * rows) for key, value in one.items()}
    cases = {"vision": Case(partial(encode, model, inputs)), **_preprocessing(shape, rows)}
    packed, peaks = {}, {}
    for keep in KEEPS:
        around = partial(vtc.compressed, model, METHOD, keep_ratio=keep)
        with around():
            prefill(model, inputs)
            packed[keep] = packed_length(vtc.report(model)) if keep < 1 else inputs["input_ids"].shape[1]
            peaks[keep] = peak_bytes(partial(prefill, model, inputs), device)
        text = {key: torch.cat([value] * rows) for key, value in plain_prompt(model, packed[keep]).items()}
        cases[f"call {keep}"] = Case(partial(_tower.call, model, inputs, compressed=True), around)
        cases[f"decode {keep}"] = Case(partial(decode, model, inputs, _STEPS[small]), around)
        cases[f"plain {keep}"] = Case(partial(prefill, model, text))
    timings = interleave(cases, repeats=_REPEATS[small], warmup=1)
    found = {label: {figure: timing.median for figure, timing in each.items()} for label, each in timings.items()}
    settings = [_row(found, keep, packed, peaks[keep], rows) for keep in KEEPS]
    whole = settings[0]
    return {
        "layers": shape.full_depth,
        "method": METHOD,
        "settings": [
            {
                **row,
                "ttft_speed_up": whole["ttft"] / row["ttft"],
                "prefill_speed_up": whole["beside_tower"] / row["beside_tower"],
                "realised_share": whole["beside_tower"] / row["beside_tower"] / row["by_tokens"],
            }
            for row in settings
        ],
    }


def _preprocessing(shape: WholeModel, rows: int) -> dict[str, Case]:
    """Return the case of the processor; none where the packages that it needs are not installed."""
    try:
        from PIL import Image

        processor = shape.processor(**shape.processing)  # of torchvision or PIL, which transformers asks for only now
    except ImportError:
        return {}
    side = shape.side(shape.visual_tokens)
    return {"processor": Case(partial(_tower.process, processor, [Image.new("RGB", (side, side), "teal")] * rows))}


def _row(found: dict[str, Any], keep: float, packed: dict[float, int], peak: int, rows: int) -> dict[str, Any]:
    call, steps = found[f"call {keep}"], found[f"decode {keep}"]
    tower = found["vision"]["vision"]
    before = found["processor"]["processor"] if "processor" in found else None
    whole = call["front"] + call["decoder"] + call["head"]
    return {
        "keep": keep,
        "tokens_before": packed[1.0],
        "tokens_after": packed[keep],
        "by_tokens": packed[1.0] / packed[keep],
        "preprocess": before,
        "tower": tower,
        "select": call["selector"] if keep < 1 else 0.0,
        "prefill": call["decoder"] + call["head"],
        "beside_tower": whole - tower,  # selection, packing, decoder and head
        "share_of_plain": found[f"plain {keep}"]["prefill"] / (whole - tower),
        "ttft": (before or 0.0) + whole,
        "step": steps["step"],
        "tokens_per_second": rows / steps["step"],
        "cache_bytes": steps["cache bytes"],
        "peak_bytes": peak,
    }
