"""`vtc calibrate`: fit a method's options to a model and a budget, on the user's own pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

import vtc
from vtc import limits, registry
from vtc.cli import arguments, samples
from vtc.files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    samples.add_arguments(parser)
    arguments.add_model(parser)
    arguments.add_method(
        parser, "vflowopt", "--option", option_help="option of the method that stays as it is; repeat for more"
    )
    arguments.add_seed(parser)
    parser.add_argument("--keep-ratio", type=float, required=True, help="fraction of visual tokens kept")
    parser.add_argument("--trials", type=int, default=50, help="settings tried (50)")
    parser.add_argument("--patience", type=int, help="stop after so many trials without a better one")
    parser.add_argument(
        "--sampler",
        choices=("tpe", "gp", "random", "cma-es"),
        default="tpe",
        help="how to choose settings (tpe); cma-es evolves what each layer keeps, for methods at the caches",
    )
    parser.add_argument("--storage", type=Path, help="file that keeps trials, to go on after an interruption")
    parser.add_argument("--plot", type=Path, help="picture of the search")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the configuration goes, as JSON")


def run(args: argparse.Namespace) -> int:
    """Search, and write the best configuration."""
    registry.get_selector(args.method, **dict(args.options))
    check_writable(*(path for path in (args.output, args.plot, args.storage) if path is not None))
    limits.check_count("--trials", args.trials, limits.MAX_ROUNDS)
    given = samples.read(args)
    model, processor = arguments.load_model(args.model, args.dtype, args.device)
    from vtc.tuning.calibrate import PlotError

    failure = None
    try:
        config = vtc.calibrate(
            model,
            processor,
            samples.encode(given, processor),
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
    except PlotError as error:
        config, failure = error.config, error
    config.save(args.output)
    print(f"{args.output}: {config.method} {dict(config.options) or 'with its defaults'}")
    print(f'use it: vtc.compress(model, vtc.CompressionConfig.load("{args.output}"))')
    if failure is not None:
        raise failure
    return 0
