"""`vtc bench serve`: vLLM's server with and without compression, under load."""

from __future__ import annotations

import argparse
from pathlib import Path

from vtc.bench.timing import check_arguments
from vtc.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vtc bench serve`."""
    parser.add_argument("checkpoint", help="folder of a checkpoint that vLLM and vtc serve")
    parser.add_argument("--method", default="divprune", help="method to measure (divprune)")
    parser.add_argument("--keep-ratio", type=float, nargs="+", default=[1.0, 0.25], help="fractions kept (1.0 0.25)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="requests at a time (1 4 16)")
    parser.add_argument("--requests", type=int, default=32, help="requests per cell, each with a new picture (32)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of an answer (16)")
    parser.add_argument("--side", type=int, default=336, help="edge of the square pictures of noise in pixels (336)")
    parser.add_argument(
        "--vllm", default="", metavar="ARGUMENTS", help="further arguments of vLLM's server in one text"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results and conditions there")
    parser.set_defaults(device="cpu")  # of this process: the server finds its own


def run(args: argparse.Namespace) -> int:
    """Start a server on this machine, measure, print the table and write JSON if requested."""
    check_arguments(args)
    for name in ("requests", "new_tokens", "side"):
        if not 1 <= getattr(args, name) <= 4096:
            raise ConfigError(f"--{name.replace('_', '-')} must lie between 1 and 4096, got {getattr(args, name)}.")
    if not all(1 <= number <= 256 for number in args.concurrency):
        raise ConfigError(f"--concurrency must lie between 1 and 256, got {args.concurrency}.")
    from vtc.bench import _serve

    return _serve.run(args)
