"""What compression does to a model of yours: which methods it can run, what they cost, whether the answer holds.

    python demos/wrap_your_model.py                                  # the reference model, a sample picture
    python demos/wrap_your_model.py /path/to/checkpoint photo.jpg "What is on the table?"

Nothing of the model is changed for good: the last lines compare its output before and after.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vtc
import vtc.reference


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="folder of a checkpoint (the reference model)")
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("question", nargs="?", default="What is left of the cup?")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    args = parser.parse_args(argv)

    model, processor = vtc.load(args.model or "reference")
    image = vtc.open_image(args.image or vtc.reference.samples()[6])
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(model.device, model.dtype)

    say(model, processor, inputs)  # what is slow the first time only
    before, seconds = say(model, processor, inputs)
    print(f"{args.question}\n{'all tokens':12} {'':12} {seconds:6.2f} s  {before}")
    for name, note in vtc.list_methods(model).items():
        if note.startswith("not on this model"):
            print(f"{name:12} {note}")
            continue
        with vtc.compressed(model, name, keep_ratio=args.keep_ratio):
            text, seconds = say(model, processor, inputs)
            report = vtc.report(model)
        kept = f"{report.average_visual_tokens:.0f} of {report.visual_tokens_before}"
        print(f"{name:12} {kept:12} {seconds:6.2f} s  {text}")
    after, _ = say(model, processor, inputs)
    print(f"after all of them the model says what it said: {after == before}")


def say(model: Any, processor: Any, inputs: Any) -> tuple[str, float]:
    """Answer, and seconds for one run: an impression, not a measurement (`vtc bench` measures)."""
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return text.strip(), time.perf_counter() - began


if __name__ == "__main__":
    main()
