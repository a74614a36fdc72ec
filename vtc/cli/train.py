"""`vtc train`: train the modules of a method on the user's own pictures and questions."""

from __future__ import annotations

import argparse
from pathlib import Path

import vtc
from vtc.cli import arguments, samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "method",
        metavar="METHOD",
        help="a method that has modules: atp, crosslmm, llava-mini, pixelrefer, vision-remember or vtc-asked",
    )
    samples.add_arguments(
        parser,
        "--data",
        more='; with "answer": TEXT it learns that answer, else the model\'s own; "region": [LEFT, TOP, RIGHT, BOTTOM] '
        "is what pixelrefer is asked about",
    )
    arguments.add_model(parser)
    arguments.add_seed(parser)
    parser.add_argument(
        "--option",
        dest="options",
        type=arguments.option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the modules, such as side=4; repeat for more",
    )
    parser.add_argument("--keep-tokens", type=int, help="tokens per picture, for crosslmm and vision-remember")
    parser.add_argument("--keep-ratio", type=float, help="or the fraction that is left")
    parser.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="train a low-rank adapter of the decoder beside the modules of crosslmm, llava-mini or vision-remember",
    )
    parser.add_argument("--steps", type=int, default=500, help="steps of the optimiser (500)")
    parser.add_argument("--batch", type=int, default=8, help="samples per step (8)")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate (1e-3)")
    parser.add_argument(
        "--positions",
        choices=("original", "compact"),
        default="original",
        help="of the new tokens; use the modules with the same (original)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the modules")


def run(args: argparse.Namespace) -> int:
    """Train, and say how to use the modules."""
    from vtc.tuning.train import check

    budget = {name: getattr(args, name) for name in ("keep_tokens", "keep_ratio") if getattr(args, name) is not None}
    check(
        args.method,
        args.output,
        steps=args.steps,
        batch=args.batch,
        rate=args.rate,
        budget=budget,
        lora=args.lora,
    )
    given = samples.read(args)
    model, processor = arguments.load_model(args.model, args.dtype, args.device)
    folder = vtc.train(
        model,
        processor,
        samples.encode(given, processor),
        args.method,
        args.output,
        answers=[sample.get("answer") for sample in given],
        regions=[[sample["region"]] if "region" in sample else None for sample in given],
        steps=args.steps,
        batch=args.batch,
        rate=args.rate,
        seed=args.seed,
        positions=args.positions,
        lora=args.lora,
        **budget,
        **dict(args.options),
    )
    keep = ", ".join(f"{name}={value}" for name, value in budget.items()) or "keep_tokens=..."
    print(f'use it: vtc.compress(model, "{args.method}", modules="{folder}", {keep})')
    return 0
