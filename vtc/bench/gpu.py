"""`vtc bench gpu`: everything that only a GPU can tell, in one command of a few minutes.

Parts: `kernels` holds every Triton kernel to its specification, `laws` holds compression to its invariants on tiny
models of five families, `models` measures whole calls at the shapes of 7B checkpoints, and `times` the kernels beside
PyTorch. Each runs in a process of its own, which is started again behind the case that broke it, and results are
written after every case. The same command goes on where it was interrupted. Without a GPU all of it runs at tiny sizes,
kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vtc.bench._gpu_parts import PARTS
from vtc.errors import ConfigError

_LEAST, _MOST = 10.0, 86_400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vtc bench gpu`."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder of gpu.json and gpu.md; goes on with a run"
    )
    parser.add_argument(
        "--part", choices=tuple(PARTS), action="append", help="part to run; repeat for more (all of them)"
    )
    parser.add_argument("--only", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--budget", type=float, default=450.0, metavar="SECONDS", help="of the whole run (450)")
    parser.add_argument("--device", default="auto", help="torch device; auto: cuda if available, else cpu (auto)")


def run(args: argparse.Namespace) -> int:
    """Run the parts, and write results after each case."""
    if not _LEAST <= args.budget <= _MOST:
        raise ConfigError(f"--budget must be from {_LEAST:g} to {_MOST:,.0f} seconds, got {args.budget:g}.")
    from vtc.bench import _gpu

    return _gpu.run(args.out, args.part or list(PARTS), args.device, args.budget, args.only)
