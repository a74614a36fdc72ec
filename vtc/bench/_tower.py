"""The whole call from pixels to the first token, with a vision tower of real shape and random weights.

Figures per setting, from medians of interleaved runs:

whole call
    The processor's work, tower and projector, as measured, plus the decoder, of which a few layers are measured and
    scaled to the depth of the checkpoint.
realised share
    Time that the untouched tower needs for the patches that each of its layers really sees, from runs on smaller
    pictures, divided by the time of ours: 1.0 is shortening without cost. The projector counts in both.
peak memory
    What tensors take at most while tower and projector run, without weights.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from PIL import Image

import vtc
from vtc.bench._models import build, prompt
from vtc.bench._prefill import encode, prefill
from vtc.bench._whole_models import WHOLE_MODELS, WholeModel
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import Case, Figures, Stopwatch, conditions, describe, interleave, markdown_table, write_json
from vtc.config import CompressionConfig
from vtc.core.sites import Pixels, VisionLayer
from vtc.engine.install import adapter_for


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
            )
        del model  # before the next one is built
    stated = conditions(
        dtype=args.dtype, device=args.device, repeats=args.repeats, warmup=args.warmup, text_tokens=args.text_tokens
    )
    print(table(results))
    print(
        f"\nMedian of {args.repeats} interleaved runs, batch 1, {args.text_tokens} text tokens, random weights, "
        f"{args.dtype}; {args.layers} decoder layers measured and scaled to all; {describe(stated)}"
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
) -> list[dict[str, Any]]:
    """Time the untouched call and every setting, and the untouched tower on smaller pictures, all interleaved.

    Returns
    -------
    list of dict
        One JSON-able result per setting, the untouched call first.
    """
    inputs = prompt(shape, model, visual_tokens, text_tokens)
    depth = len(adapter_for(model).tower_blocks("image"))
    shares = {text: seen_by_layer(plan, depth) for text, plan in plans.items()}
    side = shape.side(visual_tokens)
    cases = {
        "tower": Case(partial(encode, model, inputs)),
        "call": Case(partial(prefill, model, inputs)),
        "native 1.0": Case(partial(_native_tower, model, inputs, 1.0)),
        "processor": Case(
            partial(_process, shape.processor(**shape.processing), Image.new("RGB", (side, side), "teal"))
        ),
    }
    peaks = {"": peak_bytes(partial(encode, model, inputs), model.device)}
    for text, plan in plans.items():
        around = partial(vtc.compressed, model, plan)
        cases[f"tower {text}"] = Case(partial(encode, model, inputs), around)
        cases[f"call {text}"] = Case(partial(_compressed_call, model, inputs), around)
        with around():
            peaks[text] = peak_bytes(partial(encode, model, inputs), model.device)
    for share in {share for each in shares.values() for share in each if share < 1}:
        cases[f"native {share}"] = Case(partial(_native_tower, model, inputs, share))
    timings = interleave(cases, repeats=repeats, warmup=warmup)
    seconds = {name: next(iter(figures.values())).median for name, figures in timings.items()}
    native = {float(name.split()[1]): value for name, value in seconds.items() if name.startswith("native")}
    projector = seconds["tower"] - native[1.0]
    scale = shape.full_depth / len(model.get_decoder().layers)
    rows: list[dict[str, Any]] = []
    for text in ("", *plans):
        tower, call = (next(iter(timings[f"{part} {text}".strip()].values())) for part in ("tower", "call"))
        picked = timings[f"call {text}"]["selector"].median if text else 0.0
        decoder = (call.median - tower.median) * scale
        expected = sum(native[share] for share in shares[text]) / depth + projector if text else tower.median
        rows.append(
            {
                "model": shape.name,
                "setting": text or "untouched",
                "visual_tokens": visual_tokens,
                "processor": seconds["processor"],
                "selector": picked,
                "decoder": decoder,
                "whole_call": seconds["processor"] + tower.median + decoder,
                "realised_share": expected / tower.median,
                "tower_peak_mib": peaks[text] / 2**20,
                "tower": tower.to_dict(),
                "call": call.to_dict(),
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


def _compressed_call(model: Any, inputs: dict[str, torch.Tensor]) -> Figures:
    """Time a prefill, and the selection in it."""
    figures = prefill(model, inputs)
    return {**figures, "selector": vtc.report(model).selector_ms / 1e3}


def _process(processor: Any, picture: Image.Image) -> Figures:
    """Time what is done to a picture before the model gets it."""
    watch = Stopwatch(torch.device("cpu"))
    with watch.part("processor"):
        processor(images=picture, return_tensors="pt")
    return watch.figures


@torch.inference_mode()
def _native_tower(model: Any, inputs: dict[str, torch.Tensor], share: float) -> Figures:
    """Time the untouched tower, without projector, on a picture with `share` of the patches."""
    tower: Any = adapter_for(model).tower("image")
    pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
    watch = Stopwatch(model.device)
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
        "tower",
        "of that selection, and before the decoder",
        "decoder, scaled",
        "whole call",
        "speed-up",
        "decoder alone",
        "tower's share",
        "realised in the tower",
        "tower's peak",
    )
    return markdown_table(
        header,
        [
            (
                r["model"],
                f"{r['visual_tokens']}",
                r["setting"],
                f"{r['processor']:.2f} s",
                "{:.2f} s [{:.2f}, {:.2f}]".format(r["tower"]["median"], *r["tower"]["quartiles"]),
                f"{r['selector']:.3f} s",
                f"{r['decoder']:.2f} s",
                f"{r['whole_call']:.2f} s",
                f"**{r['speed_up']:.2f}x**",
                f"{r['decoder_speed_up']:.2f}x",
                f"{100 * r['tower']['median'] / r['whole_call']:.0f} %",
                f"{r['realised_share']:.3f}",
                f"{r['tower_peak_mib']:.0f} MiB",
            )
            for r in results
        ],
    )
