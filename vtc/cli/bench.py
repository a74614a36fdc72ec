"""`vtc bench`: measure speed on this machine, with random weights."""

from __future__ import annotations

import argparse
import importlib

BENCHES = {
    "prefill": "speed-up and realised share at the decoder shapes of real checkpoints",
    "tower": "the whole call, vision tower included, at the shapes of real checkpoints",
    "cache": "decoding with smaller key-value caches, at the decoder shapes of real checkpoints",
    "overhead": "what compression costs on a small model",
    "selectors": "each method before the decoder, alone, beside a transcription of its equations",
    "serve": "vLLM's server with and without compression, under load",
    "kernels": "each operation of vtc.kernels beside its formula in plain PyTorch",
    "gpu": "all that only a GPU can tell, in a few minutes: kernels, laws, whole calls",
}
"""Name, which is also that of a module of `vtc.bench` with the two functions of a command, and what is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks, each with its own arguments."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    for name, summary in BENCHES.items():
        bench = benches.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        importlib.import_module(f"vtc.bench.{name}").add_arguments(bench)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was named."""
    status: int = importlib.import_module(f"vtc.bench.{args.bench}").run(args)
    return status
