"""`vtc ask`: answer a question about a picture, without and with compression."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import vtc
from vtc import limits
from vtc.cli import arguments
from vtc.config import DEFAULT_METHOD


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any file that pillow reads")
    parser.add_argument("question", metavar="QUESTION")
    arguments.add_model(parser)
    arguments.add_method(parser, DEFAULT_METHOD, "-o", "--option", line=True)
    arguments.add_budget(parser, of="each image")
    arguments.add_site(parser)
    parser.add_argument(
        "--positions",
        choices=("original", "compact"),
        default="original",
        help="position ids of kept tokens: those of the full prompt, or consecutive (original)",
    )
    parser.add_argument(
        "--region",
        type=float,
        nargs=4,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="box in pixels of the picture that the question is about, for pixelrefer",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="length of the answer (32)")


def run(args: argparse.Namespace) -> int:
    """Print both answers and the report."""
    from vtc.report.views import fit_of

    stages = arguments.stages(args, positions=args.positions)
    limits.check_count("--max-new-tokens", args.max_new_tokens, limits.MAX_NEW_TOKENS)
    image = vtc.open_image(args.image)
    marked = None if args.region is None else [args.region]
    with nullcontext() if marked is None else vtc.regions(marked, image):
        pass  # refused before a model is loaded

    model, processor = arguments.load_model(args.model, args.dtype, args.device)
    inputs = arguments.prepare(model, processor, image, args.question)
    print(f"{args.question}  [{args.image.name}]")
    print(f"  all tokens: {_answer(model, processor, inputs, args.max_new_tokens)}")
    fit = fit_of(processor)
    with nullcontext() if marked is None else vtc.regions(marked, image, fit), vtc.compressed(model, stages):
        answer = _answer(model, processor, inputs, args.max_new_tokens)
        report = vtc.report(model)
    print(f"  {report.visual_tokens_after} of {report.visual_tokens_before}: {answer}\n")
    print(report)
    return 0


def _answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    """Greedy continuation of the prompt as text."""
    import torch

    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)[0].strip()
