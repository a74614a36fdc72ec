"""`vtc bench cache`: decoding at a true decoder shape, with caches from which entries left after the prefill."""

from __future__ import annotations

import argparse

from vtc.bench.prefill import MODELS
from vtc.bench.timing import add_timing_arguments, check_arguments

SETTINGS = ("random@decoder=0.25", "random@cache=0.25", "snapkv=0.25", "prefixkv=0.25")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vtc bench cache`."""
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help=f"shape to measure ({MODELS[0]})")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (4)")
    parser.add_argument("--visual-tokens", type=int, default=2880, help="visual tokens of each row (2880)")
    parser.add_argument("--text-tokens", type=int, default=64, help="text tokens of each row (64)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="rows of the prompt (1 16)")
    parser.add_argument("--steps", type=int, default=256, help="decode steps per run (256)")
    parser.add_argument(
        "--setting", nargs="+", default=list(SETTINGS), help=f"METHOD@SITE=KEEP, beside the untouched ({SETTINGS})"
    )
    add_timing_arguments(parser, repeats=5, warmup=1, dtype="bfloat16")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write JSON if requested."""
    from vtc.notation import parse_stages

    check_arguments(args)
    for setting in args.setting:
        parse_stages(setting)
    from vtc.bench import _cache

    return _cache.run(args)
