"""Decoding with caches from which entries have left: time of a step, bytes of the cache, memory.

Figures per setting, from medians of interleaved runs of one prefill and a number of steps:

tokens per second
    Rows divided by the time of a step. Every row decodes a token per step.
cache bytes
    What keys and values take up in memory behind the prefill, measured on their storages; beside it the share of the
    untouched model's, which text and rounding keep above the ratio.
peak memory
    Most that tensors take up during the prefill and during the steps, weights included: of one more run, which is not
    timed, on a GPU by its allocator and on a CPU by PyTorch's profiler (`vtc.bench.memory`).

The same tokens dropped before the decoder are the best that can be had of the cache: they save the prefill as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import vtc
from vtc.bench._models import BenchModel, build, prompt
from vtc.bench._prefill import MODELS
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import (
    Case,
    Figures,
    Stopwatch,
    conditions,
    describe,
    interleave,
    markdown_table,
    megabytes,
    spread,
    write_json,
)
from vtc.engine.cache import CACHE
from vtc.notation import parse_stages


def run(args: argparse.Namespace) -> int:
    """Measure every batch, print one table and write JSON if requested."""
    shape = MODELS[args.model]
    model = build(shape, args.layers, getattr(torch, args.dtype), args.device)
    one = prompt(shape, model, args.visual_tokens, args.text_tokens)
    results: list[dict[str, Any]] = []
    for rows in args.batch:
        inputs = {name: torch.cat([value] * rows) for name, value in one.items()}
        results += measure(
            model, inputs, shape, args.setting, steps=args.steps, repeats=args.repeats, warmup=args.warmup
        )
    stated = conditions(
        dtype=args.dtype,
        device=args.device,
        repeats=args.repeats,
        warmup=args.warmup,
        steps=args.steps,
        visual_tokens=args.visual_tokens,
        text_tokens=args.text_tokens,
    )
    print(table(results))
    print(
        f"\nMedian [quartiles] of {args.repeats} interleaved runs of one prefill and {args.steps} steps, "
        f"{args.visual_tokens} visual + {args.text_tokens} text tokens per row, {args.layers} of {shape.full_depth} "
        f"layers, random weights, {args.dtype}; {describe(stated)}"
    )
    if args.json:
        write_json(args.json, {"benchmark": "cache", "conditions": stated, "results": results})
    return 0


def measure(
    model: Any,
    inputs: dict[str, torch.Tensor],
    shape: BenchModel,
    settings: Sequence[str],
    *,
    steps: int,
    repeats: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """Time one prompt under every setting and on the untouched model, interleaved.

    Returns
    -------
    list of dict
        One JSON-able result per setting, the untouched model first.
    """
    work = partial(decode, model, inputs, steps)
    cases = {"untouched": Case(work)}
    for setting in settings:
        cases[setting] = Case(work, partial(vtc.compressed, model, parse_stages(setting)))
    timings = interleave(cases, repeats=repeats, warmup=warmup)
    peaks = {}
    for name, case in cases.items():
        with case.around():
            peaks[name] = peak_memory(model, inputs, steps)
    rows = len(inputs["input_ids"])
    whole = timings["untouched"]
    results = []
    for name, own in timings.items():
        # Rounds are interleaved, so ratios within rounds are less noisy than the ratio of two medians.
        ratios = sorted(u / c for u, c in zip(whole["step"].seconds, own["step"].seconds, strict=True))
        results.append(
            {
                "model": shape.name,
                "layers": model.config.get_text_config().num_hidden_layers,
                "batch": rows,
                "setting": name,
                "tokens_per_second": rows / own["step"].median,
                "step_speed_up": ratios[len(ratios) // 2],
                "cache_bytes": own["cache bytes"].median,
                "cache_share": own["cache bytes"].median / whole["cache bytes"].median,
                **peaks[name],
                "step": own["step"].to_dict(),
                "prefill": own["prefill"].to_dict(),
            }
        )
    return results


@torch.inference_mode()
def decode(model: Any, inputs: dict[str, torch.Tensor], steps: int) -> Figures:
    """Time a prefill and one of `steps` decode steps, and measure the cache between them."""
    watch = Stopwatch(model.device)
    with watch.part("prefill"):
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, token = output[CACHE], output.logits.argmax(-1)
    watch.figures["cache bytes"] = float(_stored(cache))
    with watch.part("step"):
        _step(model, cache, token, steps)
    watch.figures["step"] /= steps
    return watch.figures


@torch.inference_mode()
def peak_memory(model: Any, inputs: dict[str, torch.Tensor], steps: int) -> dict[str, int]:
    """Return the most bytes that the weights and all else take up during a prefill, and during `steps` decode steps."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    read: list[Any] = []
    prefill = peak_bytes(lambda: read.append(model(**inputs, use_cache=True, logits_to_keep=1)), model.device)
    cache, token = read[0][CACHE], read[0].logits.argmax(-1)
    read.clear()
    stored = _stored(cache)
    step = peak_bytes(partial(_step, model, cache, token, steps), model.device)
    return {"prefill_peak_bytes": weights + prefill, "peak_bytes": weights + stored + step}


def _step(model: Any, cache: Any, token: torch.Tensor, steps: int) -> None:
    """Decode greedily for `steps` tokens, `token` (B, 1) being the first to be read."""
    for _ in range(steps):
        output = model(input_ids=token, use_cache=True, **{CACHE: cache})
        token = output.logits.argmax(-1)


def _stored(cache: Any) -> int:
    """Bytes of memory that a cache keeps alive."""
    held = {}
    for layer in cache.layers:
        for entries in (layer.keys, layer.values):
            storage = entries.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def table(results: list[dict[str, Any]]) -> str:
    """Format results as a markdown table."""
    header = (
        *("setting", "batch", "prefill", "step", "tokens per second", "against untouched", "cache", ""),
        *("peak of the prefill", "of the steps"),
    )
    return markdown_table(
        header,
        [
            (
                r["setting"],
                f"{r['batch']}",
                spread(r["prefill"]),
                spread(r["step"]),
                f"{r['tokens_per_second']:.1f}",
                f"{r['step_speed_up']:.2f}x",
                megabytes(r["cache_bytes"]),
                f"{100 * r['cache_share']:.1f} %",
                megabytes(r["prefill_peak_bytes"]),
                megabytes(r["peak_bytes"]),
            )
            for r in results
        ],
    )
