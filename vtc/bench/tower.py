"""`vtc bench tower`: the whole call, vision tower included, at the shapes of real checkpoints."""

from __future__ import annotations

import argparse

from vtc.bench.timing import add_timing_arguments, check_arguments
from vtc.notation import parse_stages

MODELS = ("qwen2.5-vl-3b",)
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
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="shape to measure (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers measured, and scaled to all (2)")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[576], help="visual tokens per prompt (576)")
    parser.add_argument("--text-tokens", type=int, default=64, help="text tokens per prompt (64)")
    parser.add_argument(
        "--setting",
        action="append",
        metavar="METHOD@SITE=KEEP+...",
        help=f"stages to measure; repeat for more ({' '.join(SETTINGS)})",
    )
    add_timing_arguments(parser, repeats=3, warmup=1, dtype="bfloat16")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write JSON if requested."""
    check_arguments(args)
    plans = {text: parse_stages(text) for text in args.setting or SETTINGS}
    from vtc.bench import _tower

    return _tower.run(args, plans)
