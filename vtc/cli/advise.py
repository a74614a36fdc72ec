"""`vtc advise`: the cheapest setting that keeps the answers, on the user's own prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import vtc
from vtc.cli import samples as sample_files
from vtc.errors import InputError


def add_command(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("advise", help="find the cheapest setting that keeps the answers to your own prompts")
    sample_files.add_arguments(parser)
    parser.add_argument("--model", default="reference", help="reference, reference:NAME, or a checkpoint's folder")
    parser.add_argument("--agreement", type=float, default=0.9, help="share of answers that must stay the same (0.9)")
    parser.add_argument("--methods", nargs="+", help="see `vtc methods`; all that the model can run unless given")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.5, 0.25, 0.11, 0.056])
    parser.add_argument("--max-new-tokens", type=int, default=16, help="length of the answers compared (16)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per prompt (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", type=Path, help="where the chosen configuration goes, as JSON")
    parser.set_defaults(run=_advise)


def _advise(args: argparse.Namespace) -> int:
    from vtc.cli.app import _load

    if args.output is not None and not args.output.resolve().parent.is_dir():
        raise InputError(f"{args.output}: the folder does not exist.")
    samples = sample_files.read(args)
    model, processor = _load(args.model, args.dtype, args.device)
    advice = vtc.advise(
        model,
        processor,
        sample_files.encode(samples, processor),
        agreement=args.agreement,
        methods=args.methods,
        keep_ratios=args.keep_ratios,
        max_new_tokens=args.max_new_tokens,
        rounds=args.rounds,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    print(advice)
    if args.output is not None and advice.config is None:
        raise InputError(f"{args.output}: nothing was written, because no setting can be advised (see above).")
    if args.output is not None and advice.config is not None:
        advice.config.save(args.output)
        print(f'use it: vtc.compress(model, vtc.CompressionConfig.load("{args.output}"))')
    return 0
