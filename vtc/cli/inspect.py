"""`vtc inspect`: draw which parts of a picture a method keeps."""

from __future__ import annotations

import argparse
from pathlib import Path

import vtc
from vtc import limits
from vtc.cli import arguments
from vtc.config import DEFAULT_METHOD

FITS = ("crop", "pad", "stretch")
"""`vtc.report.views.FITS`, repeated because that module imports numpy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any file that pillow reads")
    parser.add_argument("--question", default="What is in the picture?", help="for methods that read it (%(default)s)")
    arguments.add_model(parser)
    arguments.add_method(parser, DEFAULT_METHOD, "--option", line=True)
    arguments.add_budget(parser, of="each image")
    arguments.add_site(parser)
    arguments.add_seed(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("kept.png"), help="where the picture goes (kept.png)")
    parser.add_argument("--size", type=int, default=448, help="longer edge of a panel in pixels, 16 to 4096 (448)")
    parser.add_argument("--fit", choices=FITS, help="how the processor fits the picture, where it cannot be asked")


def run(args: argparse.Namespace) -> int:
    """Draw the picture and print the report."""
    config = arguments.configuration(args, seed=args.seed)
    arguments.check_output(args.output, (".png", ".jpg", ".jpeg", ".webp"))
    limits.check_count("--size", args.size, limits.MAX_PANEL, least=limits.MIN_PANEL)
    image = vtc.open_image(args.image)
    model, processor = arguments.load_model(args.model, args.dtype, args.device)
    inputs = arguments.prepare(model, processor, image, args.question)

    import torch

    with vtc.compressed(model, config), torch.inference_mode():
        model(**inputs, logits_to_keep=1)
        report = vtc.report(model)
    drawn = vtc.visualize(report, image, processor=processor, fit=args.fit, size=args.size)
    arguments.save(drawn, args.output)
    print(report)
    print(f"\n{args.output}: {drawn.width} x {drawn.height}")
    return 0
