"""`vtc bench tower`: the whole call, vision tower included, at the shapes of real checkpoints."""

from __future__ import annotations

import argparse

from vtc.bench.timing import add_clock_argument, add_timing_arguments, check_arguments
from vtc.notation import parse_stages

MODELS = (
    "llava-1.5-7b",
    "llava-onevision-7b",
    "internvl3-2b",
    "internvl3-8b",
    "qwen2.5-vl-3b",
    "qwen2.5-vl-7b",
    "qwen3-vl-4b",
)
SETTINGS = (
    "divprune@decoder=0.1",
    "divprune@vision:11=0.25+divprune@decoder=0.4",
    "divprune@vision:8=0.25+divprune@decoder=0.4",
    "uniform@pixels=0.25+divprune@decoder=0.4",
)
"""Down to a tenth of the tokens before the decoder alone; with a stage at a third, or a quarter, of the tower's depth;
and with three quarters of the patches never encoded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vtc bench tower`."""
    parser.add_argument(
        "--model", choices=MODELS, action="append", help="shape to measure; repeat for more (qwen2.5-vl-3b)"
    )
    parser.add_argument("--layers", type=int, default=2, help="decoder layers measured, and scaled to all (2)")
    parser.add_argument(
        "--visual-tokens", type=int, nargs="+", help="visual tokens per prompt (those of a usual picture)"
    )
    parser.add_argument("--text-tokens", type=int, default=64, help="text tokens per prompt (64)")
    parser.add_argument(
        "--setting",
        action="append",
        metavar="METHOD@SITE=KEEP+...",
        help=f"stages to measure; repeat for more ({' '.join(SETTINGS)})",
    )
    parser.add_argument("--memory", action="store_true", help="measure peak memory of the tower and of the call, too")
    parser.add_argument(
        "--ragged", action="store_true", help="measure instead how crops that keep different numbers are best encoded"
    )
    add_clock_argument(parser)
    add_timing_arguments(parser, repeats=3, warmup=1, dtype="bfloat16")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write JSON if requested."""
    check_arguments(args)
    if args.ragged:
        from vtc.bench import _ragged

        return _ragged.run(args)
    plans = {text: parse_stages(text) for text in args.setting or SETTINGS}
    from vtc.bench import _tower

    return _tower.run(args, plans)
