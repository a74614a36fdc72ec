"""`vtc bench selectors`: every method before the decoder, alone, beside a transcription of its equations."""

from __future__ import annotations

import argparse

from vtc.bench.timing import add_clock_argument, add_timing_arguments, check_arguments
from vtc.errors import ConfigError

TOKENS = (576, 2880, 12544)
WIDTHS = (1024, 3584)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vtc bench selectors`."""
    parser.add_argument("--method", action="append", help="method to measure; repeat for more (all before the decoder)")
    parser.add_argument(
        "--tokens", type=int, action="append", choices=TOKENS, help="visual tokens; repeat for more (576, 2880, 12544)"
    )
    parser.add_argument("--width", type=int, action="append", help="width of the features; repeat (1024, 3584)")
    parser.add_argument("--keep-ratio", type=float, default=0.11, help="fraction of the tokens kept (0.11)")
    parser.add_argument(
        "--most-seconds", type=float, default=60.0, help="skip transcriptions that would take longer (60)"
    )
    add_clock_argument(parser)
    add_timing_arguments(parser, repeats=5, warmup=1, dtype="float32")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and write JSON if requested."""
    check_arguments(args)
    for width in args.width or ():
        if not 8 <= width <= 16384:
            raise ConfigError(f"--width must be from 8 to 16384, got {width}.")
    from vtc.bench import _selectors

    return _selectors.run(args, args.tokens or TOKENS, args.width or WIDTHS)
