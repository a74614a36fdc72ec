"""Targets of the operations, and whether they are met."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vtc import kernels
from vtc.bench._cost import LLAVA_7B_VIT_L, METHODS, prefill_cost, tower_cost
from vtc.bench._growth import exponent
from vtc.bench._models import build
from vtc.bench._ops import Draw
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import CLOCKS, markdown_table, megabytes, seconds

__all__ = ["Target", "check", "measure", "table"]

MODEL_REPEATS = 3  # most rounds with the model, which take a minute each
LONG = (12_500, 25_000, 50_000)
LONG_PICKS, LONG_WIDTH = 288, 1024
VISUAL_TOKENS, KEEP_RATIO = 2880, 0.1


@dataclass(frozen=True)
class Target:
    """One target: the requirement and the measured value."""

    target: str
    required: str
    measured: str
    met: bool


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the table of operations does not contain, as JSON types.

    The model always runs in bfloat16, the fastest dtype on a CPU.
    """
    model = build(LLAVA_7B_VIT_L, 1, torch.bfloat16, args.device)
    rounds: dict[str, Any] = {
        "repeats": min(args.repeats, MODEL_REPEATS),
        "warmup": min(args.warmup, 1),
        "clock": CLOCKS[args.clock],
    }
    costs = {
        "tower": tower_cost(model, **rounds),
        "prefill": prefill_cost(model, visual_tokens=VISUAL_TOKENS, keep_ratio=KEEP_RATIO, **rounds),
    }
    del model
    draw = Draw(torch.Generator().manual_seed(0), getattr(torch, args.dtype), args.device)
    memory = {}
    for n in LONG:
        x = draw.tokens(n, LONG_WIDTH)
        memory[n] = peak_bytes(lambda x=x: kernels.farthest_point(x, LONG_PICKS), args.device)  # type: ignore[misc]
    return {**costs, "farthest_point_bytes": memory}


def check(results: Mapping[str, Any], costs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare measurements with all targets; the result is JSON-able.

    Parameters
    ----------
    results
        Results of `vtc.bench._compare.measure`, by operation.
    costs
        Result of `measure`.
    """
    tower, prefill = costs["tower"], costs["prefill"]
    share = tower["scoring"]["median"] / tower["untouched"]["median"]
    more = tower["scored_bytes"] - tower["untouched_bytes"]
    received = results["attention_received"]
    memory = costs["farthest_point_bytes"]
    grows = exponent(list(memory), list(memory.values()))
    targets = [
        Target(
            "[CLS] scores of CLIP ViT-L/14-336 (bfloat16), of the tower's time",
            "< 2 %",
            f"{100 * share:.2f} % of {seconds(tower['untouched']['median'])}; output_attentions=True takes "
            f"{100 * (tower['eager']['median'] / tower['untouched']['median'] - 1):+.0f} %",
            share < 0.02,
        ),
        Target(
            "[CLS] scores, peak memory above the tower's",
            "< 1 MB",
            f"{megabytes(more)}; output_attentions=True {megabytes(tower['eager_bytes'] - tower['untouched_bytes'])}",
            more < 1e6,
        ),
        Target(
            "attention_received, peak memory",
            "< 16 MB, eager > 500 MB",
            f"{megabytes(received['ours_bytes'])}, eager {megabytes(received['baseline_bytes'])}",
            received["ours_bytes"] < 16e6 < 500e6 < received["baseline_bytes"],
        ),
        Target("attention_received, time", "no slower", f"{received['speed_up']:.2f}x", received["speed_up"] >= 1),
        *(
            Target(f"{name}, 64 of 2880, d = 3584, time", ">= 5x", f"{found['speed_up']:.2f}x", found["speed_up"] >= 5)
            for name, found in results.items()
            if name.startswith("farthest_point")
        ),
        Target(
            f"farthest_point, {LONG_PICKS} of {LONG[-1]:,} at d = {LONG_WIDTH}, peak memory",
            "linear in N",
            f"N^{grows:.2f}: " + ", ".join(f"{megabytes(count)} at {n:,}" for n, count in memory.items()),
            grows < 1.05,
        ),
        *(
            Target(
                f"all of {method}, {VISUAL_TOKENS} tokens, keep {KEEP_RATIO:g}, of a 7B prefill (bfloat16)",
                "< 1 %",
                f"{100 * prefill[method]['median'] / prefill['prefill']['median']:.2f} %: "
                f"{seconds(prefill[method]['median'])} of {seconds(prefill['prefill']['median'])}",
                prefill[method]["median"] < 0.01 * prefill["prefill"]["median"],
            )
            for method in METHODS
        ),
    ]
    return [asdict(target) for target in targets]


def table(targets: Sequence[Mapping[str, Any]]) -> str:
    """Format targets as a markdown table."""
    return markdown_table(
        ("target", "required", "measured", "met"),
        [(t["target"], t["required"], t["measured"], "yes" if t["met"] else "NO") for t in targets],
    )
