"""Overhead of compression on a model of 156 M parameters, where fixed costs weigh most.

Compares prefill and decode step of the untouched model with the same model compressed to keep everything, and of the
untouched model on a text prompt of the packed length with the model that drops tokens.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

import vtc
from vtc.bench._models import LLAVA_150M, build, packed_length, plain_prompt, prompt
from vtc.bench.timing import (
    Case,
    Figures,
    Stopwatch,
    Timing,
    conditions,
    describe,
    interleave,
    markdown_table,
    write_json,
)
from vtc.engine.cache import CACHE


def run(args: argparse.Namespace) -> int:
    """Measure, print one table and write JSON if requested."""
    model = build(LLAVA_150M, args.layers, getattr(torch, args.dtype), args.device)
    inputs = prompt(LLAVA_150M, model, args.visual_tokens, args.text_tokens)
    results = measure(
        model,
        inputs,
        method=args.method,
        keep_ratio=args.keep_ratio,
        steps=args.steps,
        repeats=args.repeats,
        warmup=args.warmup,
    )
    stated = conditions(
        dtype=args.dtype,
        device=args.device,
        repeats=args.repeats,
        warmup=args.warmup,
        steps=args.steps,
        parameters=model.num_parameters(),
        visual_tokens=args.visual_tokens,
        text_tokens=args.text_tokens,
        method=args.method,
        keep_ratio=args.keep_ratio,
    )
    print(table(results))
    print(
        f"\nMedian [quartiles] of {args.repeats} interleaved runs of one prefill and {args.steps} decode steps, "
        f"batch 1, {args.visual_tokens} visual + {args.text_tokens} text tokens, {args.method}, "
        f"{model.num_parameters() / 1e6:.0f} M random parameters, {args.dtype}; {describe(stated)}"
    )
    if args.json:
        write_json(args.json, {"benchmark": "overhead", "conditions": stated, "results": results})
    return 0


def measure(
    model: Any,
    inputs: dict[str, torch.Tensor],
    *,
    method: str,
    keep_ratio: float,
    steps: int,
    repeats: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """Time prefill and decode of the untouched and the compressed model, interleaved.

    Returns
    -------
    list of dict
        One JSON-able result per figure ("prefill", "decode step") and pair of cases.
    """
    with vtc.compressed(model, method, keep_ratio=keep_ratio):
        _generate(model, inputs, steps=1)
        packed = packed_length(vtc.report(model))
    plain = plain_prompt(model, packed)
    whole = inputs["input_ids"].shape[1]
    whole_run = partial(_generate, model, inputs, steps)
    timings = interleave(
        {
            "untouched": Case(whole_run),
            "keep all": Case(whole_run, partial(vtc.compressed, model, method, keep_ratio=1.0)),
            "plain": Case(partial(_generate, model, plain, steps)),
            "dropping": Case(whole_run, partial(vtc.compressed, model, method, keep_ratio=keep_ratio)),
        },
        repeats=repeats,
        warmup=warmup,
    )
    pairs = (
        ("keep 100 %", whole, "untouched", "keep all"),
        (f"keep {100 * keep_ratio:g} %, against a plain prompt as long", packed, "plain", "dropping"),
    )
    return [
        _compare(f"{figure}, {label}", tokens, timings[base][figure], timings[changed][figure])
        for label, tokens, base, changed in pairs
        for figure in ("prefill", "decode step")
    ]


def _compare(name: str, tokens: int, untouched: Timing, compressed: Timing) -> dict[str, Any]:
    # Rounds are interleaved, so ratios within rounds are less noisy than the ratio of two medians.
    ratios = Timing(tuple(c / u for c, u in zip(compressed.seconds, untouched.seconds, strict=True)))
    return {
        "figure": name,
        "tokens": tokens,
        "overhead": compressed.median / untouched.median - 1,
        "overhead_paired": ratios.median - 1,
        "untouched": untouched.to_dict(),
        "compressed": compressed.to_dict(),
    }


@torch.inference_mode()
def _generate(model: Any, inputs: dict[str, torch.Tensor], steps: int) -> Figures:
    """Time a prefill and one of `steps` decode steps."""
    watch = Stopwatch(model.device)
    with watch.part("prefill"):
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, token = output[CACHE], output.logits.argmax(-1)
    with watch.part("decode step"):
        for _ in range(steps):
            output = model(input_ids=token, use_cache=True, **{CACHE: cache})
            token = output.logits.argmax(-1)
    watch.figures["decode step"] /= steps
    return watch.figures


def table(results: list[dict[str, Any]]) -> str:
    """Format results as a markdown table."""
    return markdown_table(
        ("figure", "tokens", "untouched", "compressed", "overhead", "overhead, paired"),
        [
            (
                r["figure"],
                f"{r['tokens']}",
                _milliseconds(r["untouched"]),
                _milliseconds(r["compressed"]),
                f"{100 * r['overhead']:+.2f} %",
                f"{100 * r['overhead_paired']:+.2f} %",
            )
            for r in results
        ],
    )


def _milliseconds(timing: dict[str, Any]) -> str:
    low, high = timing["quartiles"]
    return f"{1e3 * timing['median']:.2f} ms [{1e3 * low:.2f}, {1e3 * high:.2f}]"
