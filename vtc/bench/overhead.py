"""`vtc bench overhead`: cost of compression on a small model, where fixed costs weigh most."""

from __future__ import annotations

import argparse

from vtc.bench.timing import add_timing_arguments, check_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vtc bench overhead`."""
    parser.add_argument("--layers", type=int, default=12, help="decoder layers (12: 156 M parameters)")
    parser.add_argument("--visual-tokens", type=int, default=576, help="visual tokens of the prompt (576)")
    parser.add_argument("--text-tokens", type=int, default=64, help="text tokens of the prompt (64)")
    parser.add_argument("--steps", type=int, default=32, help="decode steps per run (32)")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="kept by the case that drops tokens (0.25)")
    parser.add_argument("--method", default="vtc-cls", help="method to measure (vtc-cls)")
    add_timing_arguments(parser, repeats=15, warmup=2, dtype="float32")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write JSON if requested."""
    check_arguments(args)
    from vtc.bench import _overhead

    return _overhead.run(args)
