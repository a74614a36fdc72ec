"""Every operation of `vtc.kernels` beside the plain PyTorch way of today: time, peak memory, agreement.

Both ways run in turn, in an order of its own every round; short ones several times per run. Memory is what tensors
held at most during one run beyond what it was given, measured apart from the clock. Beside the table stands what was
aimed at, met or not. `--growth` lets the number of tokens grow instead, `--video` selects among those of a long video,
`--roofline` counts what the Triton kernels would take on GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtc.bench import _growth, _roofline, _targets, _video
from vtc.bench._memory import peak_bytes
from vtc.bench._ops import OPS, Draw
from vtc.bench._timing import (
    CLOCKS,
    Case,
    Timing,
    add_timing_arguments,
    conditions,
    describe,
    interleave,
    markdown_table,
    megabytes,
    repeated,
    spread,
    write_json,
)
from vtc.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench kernels`."""
    parser.add_argument(
        "--op", choices=OPS, action="append", help="operation to measure; repeat for more (all, and what was aimed at)"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--growth", action="store_true", help="time and memory against the number of tokens")
    modes.add_argument("--video", action="store_true", help="memory of selecting among the tokens of a long video")
    modes.add_argument(
        "--roofline", action="store_true", help="what the Triton kernels take at best on two GPUs, by count; no run"
    )
    parser.add_argument(
        "--most-seconds", type=float, default=60.0, help="do not run what would take longer, with --growth (60)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of --growth")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, where others use the machine too; with one thread it is what wall would be (wall)",
    )
    add_timing_arguments(parser, repeats=9, warmup=1, dtype="float32")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON if asked."""
    _check(args)
    if args.roofline:
        print(_roofline.report())
        return 0
    if args.video:
        args.dtype, args.repeats, args.warmup = "bfloat16", 1, 0
    stated = conditions(
        dtype=args.dtype, device=args.device, clock=args.clock, repeats=args.repeats, warmup=args.warmup
    )
    result: dict[str, Any]
    if args.video:
        result = {"video": _video.run(args.clock)}
    elif args.growth:
        result = {"growth": _growth.run(args)}
    else:
        result = _compare(args)
    clock = "processor time" if args.clock == "cpu" else "time on the wall"
    print(f"\n{clock[0].upper() + clock[1:]}, batch 1, {args.dtype}; {describe(stated)}")
    if args.json:
        write_json(args.json, {"benchmark": "kernels", "conditions": stated, **result})
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.plot and not args.growth:
        raise ConfigError("--plot draws what --growth measures; give both.")
    if args.op and (args.video or args.roofline):
        raise ConfigError("--op chooses none of what --video and --roofline are about; leave one of them out.")
    if args.json and args.roofline:
        raise ConfigError("--roofline measures nothing that --json could hold; leave one of them out.")
    if args.clock == "cpu" and torch.device(args.device).type != "cpu":
        raise ConfigError(f"--clock cpu does not see what runs on {args.device}; use --clock wall.")


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    results = [measure(name, args) for name in args.op or OPS]
    print(table(results))
    print(f"\nMedian [quartiles] of {args.repeats} interleaved rounds; the speed-up is the median of their ratios.")
    if args.op:
        return {"results": results}
    costs = _targets.measure(args)
    found = _targets.check({result["op"]: result for result in results}, costs)
    print("\n" + _targets.table(found))
    return {"results": results, "costs": costs, "targets": found}


@torch.no_grad()
def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One operation, both ways, as a JSON-able result."""
    op = OPS[name]
    problem = op.at(Draw(torch.Generator().manual_seed(0), getattr(torch, args.dtype), args.device))
    ways = {"ours": problem.ours, "plain": problem.plain}
    results = {way: work() for way, work in ways.items()}
    timings = interleave(
        {way: Case(repeated(work, args.device, CLOCKS[args.clock])) for way, work in ways.items()},
        repeats=args.repeats,
        warmup=args.warmup,
    )
    pairs = zip(timings["plain"]["run"].seconds, timings["ours"]["run"].seconds, strict=True)
    return {
        "op": name,
        "shape": {"n": op.n, **op.sizes},
        "plainly": op.plainly,
        "speed_up": Timing(tuple(plain / ours for plain, ours in pairs)).median,
        **{f"{way}_bytes": peak_bytes(work, args.device) for way, work in ways.items()},
        **{way: timing["run"].to_dict() for way, timing in timings.items()},
        "agreement": problem.agreement(results["ours"], results["plain"]),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as a markdown table."""
    return markdown_table(
        ("operation", "shape", "plain way", "plain", "vtc", "speed-up", "plain peak", "vtc peak", "agreement"),
        [
            (
                r["op"],
                OPS[r["op"]].words(),
                r["plainly"],
                spread(r["plain"]),
                spread(r["ours"]),
                f"{r['speed_up']:.3g}x",
                megabytes(r["plain_bytes"]),
                megabytes(r["ours_bytes"]),
                r["agreement"],
            )
            for r in results
        ],
    )
