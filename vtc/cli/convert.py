"""`vtc convert`: write an original LLaVA checkpoint as one of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

import vtc
from vtc.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a checkpoint of the original code")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--vision-tower", type=Path, help="folder of the CLIP checkpoint, if it is not found by name")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights (as stored)"
    )


def run(args: argparse.Namespace) -> int:
    """Load the checkpoint, write model and processor."""
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise InputError(f"{args.output}: exists and is no empty folder; -o takes a new one")
    model, processor = vtc.load(args.folder, vision_tower=args.vision_tower, dtype=args.dtype)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    print(f"{args.output}: {type(model).__name__}, {model.num_parameters():,} parameters")
    return 0
