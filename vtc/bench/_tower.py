"""The whole call from pixels to the first token, with a vision tower of real shape and random weights.

Figures per setting, from medians of interleaved runs:

whole call
    Tower and projector, as measured, plus the decoder, of which a few layers are measured and scaled to the depth of
    the checkpoint. The processor's work is not in it.
realised share
    Time that the untouched tower needs for the patches that each of its layers really sees, from runs on smaller
    pictures, divided by the time of ours: 1.0 is shortening without cost.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

import vtc
from vtc.bench._models import QWEN_3B_WHOLE, BenchModel, build, prompt
from vtc.bench._prefill import encode, prefill
from vtc.bench.timing import Case, conditions, describe, interleave, markdown_table, write_json
from vtc.config import CompressionConfig
from vtc.core.sites import Pixels, VisionLayer

MODELS = {QWEN_3B_WHOLE.name: QWEN_3B_WHOLE}


def run(args: argparse.Namespace, plans: dict[str, list[CompressionConfig]]) -> int:
    """Measure every setting, the stages of each by its words, print one table and write JSON if requested."""
    shape = MODELS[args.model]
    model = build(shape, args.layers, getattr(torch, args.dtype), args.device)
    results = [
        result
        for visual_tokens in args.visual_tokens
        for result in measure(
            model,
            shape,
            visual_tokens=visual_tokens,
            text_tokens=args.text_tokens,
            plans=plans,
            repeats=args.repeats,
            warmup=args.warmup,
        )
    ]
    stated = conditions(
        dtype=args.dtype, device=args.device, repeats=args.repeats, warmup=args.warmup, text_tokens=args.text_tokens
    )
    print(table(results))
    print(
        f"\nMedian of {args.repeats} interleaved runs, batch 1, {args.text_tokens} text tokens, random weights, "
        f"{args.dtype}; {args.layers} of {shape.full_depth} decoder layers measured and scaled; {describe(stated)}"
    )
    if args.json:
        write_json(args.json, {"benchmark": "tower", "conditions": stated, "results": results})
    return 0


def measure(
    model: Any,
    shape: BenchModel,
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
    depth = len(model.model.visual.blocks)
    shares = {text: seen_by_layer(plan, depth) for text, plan in plans.items()}
    cases = {"tower": Case(partial(encode, model, inputs)), "call": Case(partial(prefill, model, inputs))}
    for text, plan in plans.items():
        around = partial(vtc.compressed, model, plan)
        cases[f"tower {text}"] = Case(partial(encode, model, inputs), around)
        cases[f"call {text}"] = Case(partial(prefill, model, inputs), around)
    for share in {share for each in shares.values() for share in each if share < 1}:
        smaller = prompt(shape, model, round(share * visual_tokens), text_tokens)
        cases[f"native {share}"] = Case(partial(encode, model, smaller))
    timings = interleave(cases, repeats=repeats, warmup=warmup)
    seconds = {name: next(iter(figures.values())).median for name, figures in timings.items()}
    native = {1.0: seconds["tower"]} | {
        float(name.split()[1]): value for name, value in seconds.items() if name.startswith("native")
    }
    scale = shape.full_depth / len(model.get_decoder().layers)
    rows: list[dict[str, Any]] = []
    for text in ("", *plans):
        tower, call = (next(iter(timings[f"{part} {text}".strip()].values())) for part in ("tower", "call"))
        decoder = (call.median - tower.median) * scale
        expected = sum(native[share] for share in shares[text]) / depth if text else tower.median
        rows.append(
            {
                "model": shape.name,
                "setting": text or "untouched",
                "visual_tokens": visual_tokens,
                "decoder": decoder,
                "whole_call": tower.median + decoder,
                "realised_share": expected / tower.median,
                "tower": tower.to_dict(),
                "call": call.to_dict(),
            }
        )
    return [{**row, "speed_up": rows[0]["whole_call"] / row["whole_call"]} for row in rows]


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
    header = ("visual", "setting", "tower", "decoder, scaled", "whole call", "speed-up", "realised share in the tower")
    return markdown_table(
        header,
        [
            (
                f"{r['visual_tokens']}",
                r["setting"],
                "{:.2f} s [{:.2f}, {:.2f}]".format(r["tower"]["median"], *r["tower"]["quartiles"]),
                f"{r['decoder']:.2f} s",
                f"{r['whole_call']:.2f} s",
                f"{r['speed_up']:.2f}x",
                f"{r['realised_share']:.3f}",
            )
            for r in results
        ],
    )
