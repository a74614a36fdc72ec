"""The whole call from pixels to the first token, with a vision tower of real shape and random weights.

Figures per setting, from medians of interleaved runs:

until the decoder
    From the call of the model to its first decoder layer: tower, projector, selection.
decoder
    Its layers, of which a few are measured in the same run and scaled to the depth of the checkpoint.
whole call
    The processor's work, and both of these, and the head.
realised share
    Time that the untouched tower needs for the patches that each of its layers really sees, from runs on smaller
    pictures, divided by the time of ours: 1.0 is shortening without cost. The projector counts in both.
peak memory
    What tensors take at most while tower and projector run, and during the whole call, without weights; where asked
    for. Those of the call are of the few decoder layers, whose caches are counted.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import vtc
from vtc.bench._models import build, prompt
from vtc.bench._prefill import encode
from vtc.bench._whole_models import WHOLE_MODELS, WholeModel
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import (
    CLOCKS,
    Case,
    Figures,
    Stopwatch,
    conditions,
    describe,
    interleave,
    markdown_table,
    write_json,
)
from vtc.config import CompressionConfig
from vtc.core.sites import Pixels, VisionLayer
from vtc.engine.install import adapter_for

if TYPE_CHECKING:
    from PIL import Image


def run(args: argparse.Namespace, plans: dict[str, list[CompressionConfig]]) -> int:
    """Measure every setting, the stages of each by its words, print one table and write JSON if requested."""
    results: list[dict[str, Any]] = []
    for name in args.model or ["qwen2.5-vl-3b"]:
        shape = WHOLE_MODELS[name]
        model = build(shape, args.layers, getattr(torch, args.dtype), args.device)
        for visual_tokens in args.visual_tokens or [shape.visual_tokens]:
            results += measure(
                model,
                shape,
                visual_tokens=visual_tokens,
                text_tokens=args.text_tokens,
                plans=plans,
                repeats=args.repeats,
                warmup=args.warmup,
                memory=args.memory,
                clock=CLOCKS[args.clock],
            )
        del model  # before the next one is built
    stated = conditions(
        clock=args.clock,
        dtype=args.dtype,
        device=args.device,
        repeats=args.repeats,
        warmup=args.warmup,
        text_tokens=args.text_tokens,
    )
    print(table(results))
    print(
        f"\nMedian of {args.repeats} interleaved runs, batch 1, {args.text_tokens} text tokens, random weights, "
        f"{args.dtype}, {args.clock} clock; {args.layers} decoder layers measured and scaled to all; {describe(stated)}"
    )
    if args.json:
        write_json(args.json, {"benchmark": "tower", "conditions": stated, "results": results})
    return 0


def measure(
    model: Any,
    shape: WholeModel,
    *,
    visual_tokens: int,
    text_tokens: int,
    plans: dict[str, list[CompressionConfig]],
    repeats: int,
    warmup: int,
    memory: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Time the untouched call and every setting, and the untouched tower on smaller pictures, all interleaved.

    Returns
    -------
    list of dict
        One JSON-able result per setting, the untouched call first.
    """
    from PIL import Image

    inputs = prompt(shape, model, visual_tokens, text_tokens)
    depth = len(adapter_for(model).tower_blocks("image"))
    shares = {text: seen_by_layer(plan, depth) for text, plan in plans.items()}
    side = shape.side(visual_tokens)
    cases = {
        "untouched": Case(partial(call, model, inputs, clock=clock)),
        "native 1.0": Case(partial(_native_tower, model, inputs, 1.0, clock)),
        "processor": Case(
            partial(process, shape.processor(**shape.processing), [Image.new("RGB", (side, side), "teal")], clock)
        ),
    }
    peaks = {"untouched": _peaks(model, inputs)} if memory else {}
    for text, plan in plans.items():
        around = partial(vtc.compressed, model, plan)
        cases[text] = Case(partial(call, model, inputs, compressed=True, clock=clock), around)
        if memory:
            with around():
                peaks[text] = _peaks(model, inputs)
    for share in {share for each in shares.values() for share in each if share < 1}:
        cases[f"native {share}"] = Case(partial(_native_tower, model, inputs, share, clock))
    timings = interleave(cases, repeats=repeats, warmup=warmup)
    native = {
        float(name.split()[1]): figures["vision"].median
        for name, figures in timings.items()
        if name.startswith("native")
    }
    processor = timings["processor"]["processor"].median
    beside = timings["untouched"]["front"].median - native[1.0]  # projector and what else is done once
    scale = shape.full_depth / len(model.get_decoder().layers)
    rows: list[dict[str, Any]] = []
    for text in ("untouched", *plans):
        figures = timings[text]
        front, decoder = figures["front"], figures["decoder"].median * scale
        plan_shares = shares.get(text, [1.0])
        expected = sum(native[share] for share in plan_shares) / len(plan_shares) + beside
        rows.append(
            {
                "model": shape.name,
                "setting": text,
                "visual_tokens": visual_tokens,
                "processor": processor,
                "selector": figures["selector"].median if text in plans else 0.0,
                "front": front.to_dict(),
                "decoder": decoder,
                "whole_call": processor + front.median + decoder + figures["head"].median,
                "realised_share": expected / front.median,
                "tower_peak_mib": peaks[text][0] / 2**20 if memory else None,
                "call_peak_mib": peaks[text][1] / 2**20 if memory else None,
            }
        )
    first = rows[0]
    return [
        {
            **row,
            "speed_up": first["whole_call"] / row["whole_call"],
            "decoder_speed_up": first["decoder"] / row["decoder"],
        }
        for row in rows
    ]


def _peaks(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Return the peaks of tower and projector, and of the whole call."""
    runs = (partial(encode, model, inputs), partial(_prefill, model, inputs))
    first, second = (peak_bytes(run, model.device) for run in runs)
    return first, second


@torch.inference_mode()
def _prefill(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    return model(**inputs, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def call(
    model: Any,
    inputs: dict[str, torch.Tensor],
    *,
    compressed: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Figures:
    """Time a prefill, its part up to the first decoder layer, that of the layers, and that behind them."""
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        marks.append(clock())

    layers = model.get_decoder().layers
    # These hooks come last, so that what `vtc` does on entering a layer is over.
    hooks = [layers[0].register_forward_pre_hook(mark), layers[-1].register_forward_hook(mark)]
    try:
        mark()
        model(**inputs, use_cache=True, logits_to_keep=1)
        mark()
    finally:
        for hook in hooks:
            hook.remove()
    front, decoder, head = (after - before for before, after in itertools.pairwise(marks))
    figures = {"front": front, "decoder": decoder, "head": head}
    return {**figures, "selector": vtc.report(model).selector_ms / 1e3} if compressed else figures


def process(processor: Any, pictures: list[Image.Image], clock: Callable[[], float] = time.perf_counter) -> Figures:
    """Time what is done to pictures before the model gets them."""
    watch = Stopwatch(torch.device("cpu"), clock=clock)
    with watch.part("processor"):
        processor(images=pictures, return_tensors="pt")
    return watch.figures


@torch.inference_mode()
def _native_tower(model: Any, inputs: dict[str, torch.Tensor], share: float, clock: Callable[[], float]) -> Figures:
    """Time the untouched tower, without projector, on a picture with `share` of the patches."""
    tower: Any = adapter_for(model).tower("image")
    pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
    watch = Stopwatch(model.device, clock=clock)
    if grid is None:
        size = tower.config.patch_size
        patch = size[0] if isinstance(size, (list, tuple)) else size
        columns = pixels.shape[-1] // patch
        pixels = pixels.flatten(0, -4)[..., : max(1, round(share * columns)) * patch]
        more = {} if type(tower).__name__.startswith("InternVL") or share == 1 else {"interpolate_pos_encoding": True}
        with watch.part("vision"):
            tower(pixels.contiguous(), **more)
        return watch.figures
    grid = grid.clone()
    merge = tower.config.spatial_merge_size
    grid[0, 2] = max(1, round(share * int(grid[0, 2]) / merge)) * merge
    with watch.part("vision"):
        tower(pixels[: int(grid.prod())], grid_thw=grid)
    return watch.figures


def seen_by_layer(plan: list[CompressionConfig], depth: int) -> list[float]:
    """Return the share of the patches that each tower layer sees."""
    shares = [1.0] * depth
    for config in plan:
        site = config.site
        if isinstance(site, (Pixels, VisionLayer)) and config.keep_ratio is not None:
            start = site.layer if isinstance(site, VisionLayer) else 0
            shares[start:] = [share * config.keep_ratio for share in shares[start:]]
    return shares


def table(results: list[dict[str, Any]]) -> str:
    """Format results as a markdown table."""
    header = (
        "model",
        "visual",
        "setting",
        "processor",
        "until the decoder",
        "of that selection",
        "decoder, scaled",
        "whole call",
        "speed-up",
        "decoder alone",
        "share until the decoder",
        "realised in the tower",
        "tower's peak",
        "call's peak",
    )
    return markdown_table(
        header,
        [
            (
                r["model"],
                f"{r['visual_tokens']}",
                r["setting"],
                f"{r['processor']:.2f} s",
                "{:.2f} s [{:.2f}, {:.2f}]".format(r["front"]["median"], *r["front"]["quartiles"]),
                f"{r['selector']:.3f} s",
                f"{r['decoder']:.2f} s",
                f"{r['whole_call']:.2f} s",
                f"**{r['speed_up']:.2f}x**",
                f"{r['decoder_speed_up']:.2f}x",
                f"{100 * r['front']['median'] / r['whole_call']:.0f} %",
                f"{r['realised_share']:.3f}",
                *("" if r[name] is None else f"{r[name]:.0f} MiB" for name in ("tower_peak_mib", "call_peak_mib")),
            )
            for r in results
        ],
    )
