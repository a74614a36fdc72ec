"""One picture with what every method keeps of one image, and what the model answers then.

    python demos/compare_methods.py                                  # all methods on a sample, to methods.png
    python demos/compare_methods.py photo.jpg "What is on the table?" --keep-ratio 0.1 -o kept.png

The picture at the top of README:

    python demos/compare_methods.py --methods vtc-cls divprune fastv random --keep-ratio 0.12 --columns 5 \
        --size 230 -o docs/assets/kept.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

import vtc
import vtc.reference
from vtc.chat import image_inputs
from vtc.console import finish
from vtc.files import check_writable, replacing

SAMPLE, QUESTION = 6, "What is left of the cup?"
LINE, GAP = 18, 6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="?", help="a picture (a sample of the reference model)")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--methods", nargs="+", help="by default all that work on the model")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--size", type=int, default=280, help="longer edge of a panel in pixels")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path, default=Path("methods.png"))
    args = parser.parse_args(argv)

    check_writable(args.output)
    model, processor = vtc.reference.load("llava")
    image = vtc.open_image(args.image or vtc.reference.samples()[SAMPLE])
    inputs = image_inputs(processor, [image], args.question)
    able = [name for name, note in vtc.list_methods(model).items() if not note.startswith("not on this model")]
    panels = [captioned(fitted(image, args.size), ["all tokens", answer(model, processor, inputs)])]
    for name in args.methods or able:
        with vtc.compressed(model, name, keep_ratio=args.keep_ratio):
            text = answer(model, processor, inputs)
            report = vtc.report(model)
        drawn = vtc.visualize(report, image, processor=processor, size=args.size, titles=False, last=True)
        kept = f"{report.visual_tokens_after} of {report.visual_tokens_before}"
        if report.average_visual_tokens > report.visual_tokens_after:
            kept += f", mean {report.average_visual_tokens:.0f}"
        panels.append(captioned(drawn, [f"{name}: {kept}", text]))
        print(f"{name:12} {kept:24} {text}")
    with replacing(args.output) as file:
        sheet(panels, args.columns).quantize(255, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{args.question}  ->  {args.output}")


def answer(model: Any, processor: Any, inputs: Any, length: int = 16) -> str:
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    text: str = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return text.strip()


def fitted(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def captioned(panel: Image.Image, lines: Sequence[str]) -> Image.Image:
    out = Image.new("RGB", (panel.width, panel.height + LINE * len(lines)), "white")
    out.paste(panel, (0, 0))
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(13)
    for number, line in enumerate(lines):
        draw.text((1, panel.height + 2 + LINE * number), line, fill=(20, 20, 20), font=font)
    return out


def sheet(panels: Sequence[Image.Image], columns: int) -> Image.Image:
    width, height = max(panel.width for panel in panels) + GAP, max(panel.height for panel in panels) + GAP
    columns = min(columns, len(panels))
    out = Image.new("RGB", (width * columns - GAP, height * -(-len(panels) // columns) - GAP), "white")
    for number, panel in enumerate(panels):
        out.paste(panel, (number % columns * width, number // columns * height))
    return out


if __name__ == "__main__":
    sys.exit(finish("compare_methods", main))
