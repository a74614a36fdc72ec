"""`vtc bench kernels`: time, peak memory and agreement of every operation of `vtc.kernels` and its baseline.

By default both implementations run at one shape, and a second table compares the results with the targets of the
project. `--growth` measures time and memory against the number of tokens, and `--video` the memory of selecting among
the tokens of a long video.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vtc.bench.timing import add_clock_argument, add_timing_arguments, check_arguments, conditions, describe, write_json
from vtc.errors import ConfigError

OPERATIONS = (
    "attention_rows",
    "attention_received",
    "pagerank",
    "topk_indices",
    "select_gather",
    "farthest_point",
    "farthest_point/noise",
    "farthest_point/first",
    "relevant_farthest_point",
    "max_sum",
    "dpp_greedy",
    "coverage_greedy",
    "bipartite_merge",
    "segment_merge",
    "temporal_similarity",
    "patch_entropy",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vtc bench kernels`."""
    parser.add_argument(
        "--op", choices=OPERATIONS, action="append", help="operation to measure; repeat for more (all, and the targets)"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--growth", action="store_true", help="time and memory against the number of tokens")
    modes.add_argument("--video", action="store_true", help="memory of selecting among the tokens of a long video")
    parser.add_argument(
        "--most-seconds", type=float, default=60.0, help="skip what would take longer, with --growth (60)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot of --growth")
    add_clock_argument(parser)
    add_timing_arguments(parser, repeats=9, warmup=1, dtype="float32")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and write JSON if requested."""
    _check(args)
    from vtc.bench import _compare, _growth, _video

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
        result = _compare.run(args)
    clock = "Processor time" if args.clock == "cpu" else "Wall-clock time"
    print(f"\n{clock}, batch 1, {args.dtype}; {describe(stated)}")
    if args.json:
        write_json(args.json, {"benchmark": "kernels", "conditions": stated, **result})
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.plot and not args.growth:
        raise ConfigError("--plot draws what --growth measures; give both.")
    if args.op and args.video:
        raise ConfigError("--op has no effect on --video; leave one of them out.")
    check_arguments(args, args.plot)
