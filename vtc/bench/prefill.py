"""`vtc bench prefill`: speed-up of a prefill at the decoder shapes of real checkpoints."""

from __future__ import annotations

import argparse

from vtc.bench.timing import add_timing_arguments, check_arguments

MODELS = ("llava-1.5-7b", "qwen2.5-vl-3b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vtc bench prefill`."""
    parser.add_argument("--model", choices=MODELS, action="append", help="shape to measure; repeat for more (both)")
    parser.add_argument("--layers", type=int, help="decoder layers (as many as the checkpoint has)")
    parser.add_argument(
        "--visual-tokens", type=int, nargs="+", default=[576, 2880], help="visual tokens per prompt (576 2880)"
    )
    parser.add_argument("--text-tokens", type=int, default=64, help="text tokens per prompt (64)")
    parser.add_argument(
        "--keep-ratio", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="fractions kept (0.5 0.25 0.1)"
    )
    parser.add_argument("--method", help="method to measure (vtc-cls for LLaVA, divprune for Qwen)")
    add_timing_arguments(parser, repeats=5, warmup=1, dtype="bfloat16")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write JSON if requested."""
    check_arguments(args)
    from vtc.bench import _prefill

    return _prefill.run(args)
