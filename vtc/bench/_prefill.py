"""Speed-up of a prefill at the decoder shapes of real checkpoints.

Figures per setting, from medians of interleaved runs:

speed-up
    Time of the untouched model divided by the time of the compressed model, on the same prompt: the gain of a user.
realised share
    Time of the untouched model on a text prompt of the packed length, divided by the time of the compressed prefill
    with selection: the part of the possible gain that is realised; 1.0 is compression without cost. A text prompt has
    no image, so the time of vision tower and projector, which both models spend, is subtracted from the compressed
    prefill. The share of the whole call, without this subtraction, is listed beside it.

The ratio of FLOPs is listed too. Where reading the weights rather than arithmetic bounds short prefills (on a CPU, or a
GPU with a small batch) no method can reach that ratio.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

import vtc
from vtc.bench._models import LLAVA_7B, QWEN_3B, BenchModel, build, packed_length, plain_prompt, prompt
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
from vtc.report.flops import DecoderShape

MODELS = {model.name: model for model in (LLAVA_7B, QWEN_3B)}


def run(args: argparse.Namespace) -> int:
    """Measure every setting, print one table and write JSON if requested."""
    results: list[dict[str, Any]] = []
    for name in args.model or MODELS:
        shape = MODELS[name]
        model = build(shape, args.layers or shape.full_depth, getattr(torch, args.dtype), args.device)
        for visual_tokens in args.visual_tokens:
            inputs = prompt(shape, model, visual_tokens, args.text_tokens)
            results += measure(
                model,
                inputs,
                shape,
                visual_tokens=visual_tokens,
                keep_ratios=args.keep_ratio,
                method=args.method or shape.method,
                repeats=args.repeats,
                warmup=args.warmup,
            )
        del model  # before the next one is built, as two of them may not fit into memory
    stated = conditions(
        dtype=args.dtype, device=args.device, repeats=args.repeats, warmup=args.warmup, text_tokens=args.text_tokens
    )
    print(table(results))
    print(
        f"\nMedian [quartiles] of {args.repeats} interleaved runs, batch 1, {args.text_tokens} text tokens, "
        f"random weights, {args.dtype}; {describe(stated)}"
    )
    if args.json:
        write_json(args.json, {"benchmark": "prefill", "conditions": stated, "results": results})
    return 0


def measure(
    model: Any,
    inputs: dict[str, torch.Tensor],
    shape: BenchModel,
    *,
    visual_tokens: int,
    keep_ratios: list[float],
    method: str,
    repeats: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """Time one whole prompt, compressed to each ratio, and text prompts of each packed length, all interleaved.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    inputs : dict of str to Tensor
        One row with `visual_tokens` visual tokens.
    shape : BenchModel
        Shape of the model.
    visual_tokens : int
    keep_ratios : list of float
    method : str
    repeats, warmup : int

    Returns
    -------
    list of dict
        One JSON-able result per ratio.
    """
    cases = {"whole": Case(partial(prefill, model, inputs)), "vision": Case(partial(encode, model, inputs))}
    packed = {}
    for ratio in keep_ratios:
        compressed = partial(vtc.compressed, model, method, keep_ratio=ratio)
        with compressed():
            prefill(model, inputs)
            packed[ratio] = packed_length(vtc.report(model))
        cases[f"compressed {ratio}"] = Case(partial(_compressed_prefill, model, inputs), compressed)
        cases[f"plain {ratio}"] = Case(partial(prefill, model, plain_prompt(model, packed[ratio])))
    timings = interleave(cases, repeats=repeats, warmup=warmup)

    decoder = DecoderShape.from_config(model.config.get_text_config())
    tokens = inputs["input_ids"].shape[1]
    return [
        {
            "model": shape.name,
            "layers": len(decoder.layers),
            "layers_of_checkpoint": shape.full_depth,
            "method": method,
            "visual_tokens": visual_tokens,
            "keep_ratio": ratio,
            "tokens_before": tokens,
            "tokens_after": packed[ratio],
            "flops_ratio": decoder.prefill_flops(tokens) / decoder.prefill_flops(packed[ratio]),
            **_figures(
                whole=timings["whole"]["prefill"],
                compressed=timings[f"compressed {ratio}"]["prefill"],
                plain=timings[f"plain {ratio}"]["prefill"],
                vision=timings["vision"]["vision"],
            ),
            "selector": timings[f"compressed {ratio}"]["selector"].to_dict(),
        }
        for ratio in keep_ratios
    ]


def _figures(whole: Timing, compressed: Timing, plain: Timing, vision: Timing) -> dict[str, Any]:
    """Return the figures and the timings that they are computed from."""
    rounds = zip(plain.seconds, compressed.seconds, vision.seconds, strict=True)
    shares = Timing(tuple(p / (c - v) for p, c, v in rounds))
    return {
        "speed_up": whole.median / compressed.median,
        "realised_share": plain.median / (compressed.median - vision.median),
        "realised_share_quartiles": list(shares.quartiles),  # of the rounds
        "realised_share_of_whole_call": plain.median / compressed.median,
        "whole": whole.to_dict(),
        "compressed": compressed.to_dict(),
        "plain": plain.to_dict(),
        "vision": vision.to_dict(),
    }


@torch.inference_mode()
def prefill(model: Any, inputs: dict[str, torch.Tensor]) -> Figures:
    """Time one prefill as in `generate`: with a cache, logits of the last position."""
    watch = Stopwatch(model.device)
    with watch.part("prefill"):
        model(**inputs, use_cache=True, logits_to_keep=1)
    return watch.figures


def _compressed_prefill(model: Any, inputs: dict[str, torch.Tensor]) -> Figures:
    """Time a prefill as `prefill` does, and the selection in it."""
    figures = prefill(model, inputs)
    return {**figures, "selector": vtc.report(model).selector_ms / 1e3}


@torch.inference_mode()
def encode(model: Any, inputs: dict[str, torch.Tensor]) -> Figures:
    """Time tower and projector, the part of a prefill that compression before the decoder does not change."""
    watch = Stopwatch(model.device)
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "image_sizes") if name in inputs}
    with watch.part("vision"):
        model.get_image_features(**pictures)
    return watch.figures


def table(results: list[dict[str, Any]]) -> str:
    """Format results as a markdown table."""
    header = (
        "model",
        "method",
        "visual",
        "keep",
        "tokens",
        "whole",
        "compressed",
        "of that selector",
        "of that vision",
        "speed-up",
        "by FLOPs",
        "realised share",
        "of the whole call",
    )
    return markdown_table(
        header,
        [
            (
                f"{r['model']}, {r['layers']} of {r['layers_of_checkpoint']} layers",
                r["method"],
                f"{r['visual_tokens']}",
                f"{r['keep_ratio']:g}",
                f"{r['tokens_before']} → {r['tokens_after']}",
                _seconds(r["whole"]),
                _seconds(r["compressed"]),
                f"{r['selector']['median']:.3f} s",
                f"{r['vision']['median']:.3f} s",
                f"{r['speed_up']:.2f}x",
                f"{r['flops_ratio']:.2f}x",
                "{:.3f} [{:.3f}, {:.3f}]".format(r["realised_share"], *r["realised_share_quartiles"]),
                f"{r['realised_share_of_whole_call']:.3f}",
            )
            for r in results
        ],
    )


def _seconds(timing: dict[str, Any]) -> str:
    low, high = timing["quartiles"]
    return f"{timing['median']:.3f} s [{low:.3f}, {high:.3f}]"
