"""Crops of one batch that keep different numbers of patches: padded with a mask, or one by one.

The engine pads. Layers of CLIP-L are run both ways on the same patches; a rectangle of crops that keep equally many, in
all the same number, is the time that neither can beat.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from vtc.bench.timing import Case, Figures, Stopwatch, conditions, describe, interleave, markdown_table, write_json

CROPS, LAYERS = 5, 4


def run(args: argparse.Namespace) -> int:
    """Measure three spreads of kept patches, print the table and write JSON if requested."""
    dtype = getattr(torch, args.dtype)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=LAYERS, num_attention_heads=16
    )
    layers = CLIPVisionModel(config).to(args.device, dtype).eval().encoder.layers
    cases: dict[str, Case] = {}
    spreads = {f"{low} to {high}": (low, high) for low, high in ((280, 300), (200, 380), (60, 520))}
    for name, (low, high) in spreads.items():
        lengths = torch.linspace(low, high, CROPS).round().int().tolist()
        rows = [torch.randn(1, n, 1024, device=args.device, dtype=dtype) for n in lengths]
        padded = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        there = torch.arange(padded.shape[1], device=args.device) < torch.tensor(lengths, device=args.device)[:, None]
        mask = torch.zeros_like(there, dtype=dtype).masked_fill(~there, torch.finfo(dtype).min)[:, None, None]
        equal = torch.randn(CROPS, sum(lengths) // CROPS, 1024, device=args.device, dtype=dtype)
        cases[f"{name}, padded"] = Case(partial(_encode, layers, [padded], mask))
        cases[f"{name}, one by one"] = Case(partial(_encode, layers, rows, None))
        cases[f"{name}, rectangle"] = Case(partial(_encode, layers, [equal], None))
    timings = interleave(cases, repeats=args.repeats, warmup=args.warmup)
    results = [{"case": name, **figures["layers"].to_dict()} for name, figures in timings.items()]
    stated = conditions(dtype=args.dtype, device=args.device, repeats=args.repeats, warmup=args.warmup)
    print(
        markdown_table(
            ("patches kept of each crop, way", "time"),
            [(r["case"], "{:.0f} ms [{:.0f}, {:.0f}]".format(*_ms(r["median"], *r["quartiles"]))) for r in results],
        )
    )
    print(
        f"\nMedian of {args.repeats} interleaved runs, {CROPS} crops, {LAYERS} layers of CLIP-L, {args.dtype}; "
        f"{describe(stated)}"
    )
    if args.json:
        write_json(args.json, {"benchmark": "ragged", "conditions": stated, "results": results})
    return 0


def _ms(*seconds: float) -> list[float]:
    return [1e3 * each for each in seconds]


@torch.inference_mode()
def _encode(layers: Any, batches: list[torch.Tensor], mask: torch.Tensor | None) -> Figures:
    device = batches[0].device
    watch = Stopwatch(device)
    with watch.part("layers"):
        for hidden in batches:
            for layer in layers:
                hidden = layer(hidden, attention_mask=mask)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return watch.figures
