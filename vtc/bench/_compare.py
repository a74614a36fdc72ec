"""Every operation of `vtc.kernels` and its baseline at one shape: time, peak memory, agreement."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from vtc.bench import _targets
from vtc.bench._ops import OPS, Draw
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import CLOCKS, Case, Timing, interleave, markdown_table, megabytes, repeated, spread


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the requested operations, or all and the targets; print the tables and return JSON-able results."""
    results = [measure(name, args) for name in args.op or OPS]
    print(table(results))
    print(
        f"\nMedian [quartiles] of {args.repeats} interleaved rounds; the speed-up is the median of their ratios. "
        "Baselines of attention and of greedy selection compute in float32."
    )
    if args.op:
        return {"results": results}
    costs = _targets.measure(args)
    found = _targets.check({result["op"]: result for result in results}, costs)
    print("\n" + _targets.table(found))
    return {"results": results, "costs": costs, "targets": found}


@torch.no_grad()
def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure both implementations of one operation and return a JSON-able result."""
    op = OPS[name]
    problem = op.at(Draw(torch.Generator().manual_seed(0), getattr(torch, args.dtype), args.device))
    works = {"ours": problem.ours, "baseline": problem.baseline}
    results = {label: work() for label, work in works.items()}
    timings = interleave(
        {label: Case(repeated(work, args.device, CLOCKS[args.clock])) for label, work in works.items()},
        repeats=args.repeats,
        warmup=args.warmup,
    )
    pairs = zip(timings["baseline"]["run"].seconds, timings["ours"]["run"].seconds, strict=True)
    return {
        "op": name,
        "shape": {"n": op.n, **op.sizes},
        "baseline_code": op.baseline,
        "speed_up": Timing(tuple(baseline / ours for baseline, ours in pairs)).median,
        **{f"{label}_bytes": peak_bytes(work, args.device) for label, work in works.items()},
        **{label: timing["run"].to_dict() for label, timing in timings.items()},
        "agreement": problem.agreement(results["ours"], results["baseline"]),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Format results as a markdown table."""
    return markdown_table(
        (
            "operation",
            "shape",
            "baseline",
            "baseline time",
            "vtc time",
            "speed-up",
            "baseline peak",
            "vtc peak",
            "agreement",
        ),
        [
            (
                r["op"],
                OPS[r["op"]].words(),
                r["baseline_code"],
                spread(r["baseline"]),
                spread(r["ours"]),
                f"{r['speed_up']:.3g}x",
                megabytes(r["baseline_bytes"]),
                megabytes(r["ours_bytes"]),
                r["agreement"],
            )
            for r in results
        ],
    )
