"""`vtc calibrate`: fit a method's options to a model and a budget, on the user's own pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import vtc
from vtc import registry
from vtc.cli import samples as sample_files
from vtc.errors import InputError


def add_command(commands: Any) -> None:
    """Register the subcommand."""
    from vtc.cli.app import _option

    parser = commands.add_parser("calibrate", help="fit a method's options to your own pictures and questions")
    sample_files.add_arguments(parser)
    parser.add_argument("--model", default="reference", help="reference, reference:NAME, or a checkpoint's folder")
    parser.add_argument("--method", default="vflowopt", help="see `vtc methods` (vflowopt)")
    parser.add_argument(
        "--option",
        dest="options",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method that stays as it is; repeat for more",
    )
    parser.add_argument("--keep-ratio", type=float, required=True)
    parser.add_argument("--trials", type=int, default=50, help="(50)")
    parser.add_argument("--patience", type=int, help="stop after so many trials without a better one")
    parser.add_argument("--sampler", choices=("tpe", "gp", "random"), default="tpe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", type=Path, help="file that keeps trials, to go on after an interruption")
    parser.add_argument("--plot", type=Path, help="picture of the search")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the configuration goes, as JSON")
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    from vtc.cli.app import _load

    registry.get_selector(args.method, **dict(args.options))
    for path in (args.output, args.plot, args.storage):
        if path is not None and not path.resolve().parent.is_dir():
            raise InputError(f"{path}: the folder does not exist.")
    samples = sample_files.read(args)
    model, processor = _load(args.model, args.dtype, args.device)
    config = vtc.calibrate(
        model,
        processor,
        sample_files.encode(samples, processor),
        keep_ratio=args.keep_ratio,
        method=args.method,
        trials=args.trials,
        sampler=args.sampler,
        seed=args.seed,
        patience=args.patience,
        storage=args.storage,
        plot=args.plot,
        **dict(args.options),
    )
    config.save(args.output)
    print(f"{args.output}: {config.method} {dict(config.options) or 'with its defaults'}")
    print(f'use it: vtc.compress(model, vtc.CompressionConfig.load("{args.output}"))')
    return 0
