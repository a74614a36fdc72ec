"""What trained methods cost: time to the first token and memory of a call, beside `pool` and `vtc` at equal counts.

    python -m eval.learned_cost time llava-mini-4 crosslmm-4 --tokens 4 --rounds 10 --table cost.json
    python -m eval.learned_cost untrained crosslmm --tokens 16 --out untrained-crosslmm
    vtc bench tower --model llava-1.5-7b --layers 5 --memory --setting pool=16 \\
        --setting 'crosslmm(modules="untrained-crosslmm")=16'

The first is of a reference model, from pixels that are ready to the first token, in seconds of the processor, which
with one thread are those of an idle machine. The second makes modules for the shape of LLaVA-1.5-7B, whose weights are
random as the model's are: only their time tells. Its decoder is cut to few layers; modules inside it stand in front of
every fourth, as they would in the whole one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vtc
import vtc.reference
from eval import models
from eval.conditions import conditions
from eval.packed_reader import READERS, ClipReader, PackedReader, clip_of, compressed
from eval.tasks.base import Media, Sample
from eval.tasks.clips.clip import FPS
from eval.tasks.scenes.scene import make_scene
from eval.tasks.scenes.sources import Split
from eval.tasks.video import Frames
from eval.train_learned import METHODS
from vtc.bench.memory import peak_bytes
from vtc.selectors import learned
from vtc.selectors.learned import crosslmm, llava_mini, vision_remember

MIB = 2**20

WIDTH, HEADS, HIDDEN = 4096, 32, 11008
VISION_WIDTH, FEATURE_LAYER = 1024, 22
"""Sizes of LLaVA-1.5-7B: its decoder, the width of its tower and the layer (0-based) that feeds the projector."""


def prompt(reader: PackedReader, loaded: models.Loaded, split: Split, seed: int, index: int) -> tuple[str, Any]:
    """Return the first question about a scene or clip, and the inputs of the model that asks it."""
    if isinstance(reader, ClipReader):
        clip = clip_of(split, seed, index)
        frames = compressed(clip)
        shown = Media([], Frames(frames, tuple(range(len(frames))), FPS, len(frames)))
        question = reader.ask(clip, 1, 0)[0].text
    else:
        scene = make_scene(split, seed, index)
        shown, question = Media([Image.fromarray(scene.image)]), reader.ask(scene, 1, 0)[0].text
    return question, models.inputs(loaded, [Sample("", question)], [shown])


@torch.inference_mode()
def measure(task: str, folders: Sequence[Path], counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Time all settings in every round, in random orders, each round on another scene or clip of the test split."""
    reader: PackedReader = READERS[task]()
    model, processor = vtc.reference.load(reader.name)
    loaded = models.Loaded(model, processor, reader.name, "")
    plans: dict[str, list[vtc.CompressionConfig]] = {"all tokens": []}
    for count in counts:
        plans |= {f"{name} {count}": [vtc.CompressionConfig(name, keep_tokens=count)] for name in ("pool", "vtc")}
    for folder in folders:
        told = json.loads((folder / "modules.json").read_text())
        side, count = told["settings"].get("side"), told["training"].get("tokens")
        count = reader.grid[0] * side**2 if side else count
        config = vtc.CompressionConfig(told["method"], keep_tokens=count, options={"modules": str(folder)})
        plans[f"{told['method']} {count}"] = [config]
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(-1, rounds):  # round -1 is the untimed one
        inputs = prompt(reader, loaded, "test", 21, max(0, number))[1]
        for name in random.Random(number).sample(list(plans), len(plans)):
            if plans[name]:
                vtc.compress(model, plans[name])
            began = time.process_time()
            model(**inputs, use_cache=True, logits_to_keep=1)
            taken = time.process_time() - began
            vtc.restore(model)
            if number >= 0:
                seconds[name].append(taken)
    rows = []
    for name, plan in plans.items():
        if plan:
            vtc.compress(model, plan)
        peak = peak_bytes(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
        vtc.restore(model)
        low, high = np.quantile(seconds[name], [0.25, 0.75])
        share = statistics.median(b / a for a, b in zip(seconds["all tokens"], seconds[name], strict=True))
        row = {"setting": name, "ttft": statistics.median(seconds[name]), "quartiles": [low, high], "share": share}
        rows.append({**row, "peak_mib": peak / MIB})
        spread = f"{1e3 * row['ttft']:.0f} ms [{1e3 * low:.0f}, {1e3 * high:.0f}]"
        print(f"{name}: {spread}, {share:.2f} of all tokens', {peak / MIB:.1f} MiB", flush=True)
    stated = {name: value for name, value in conditions("python -m eval.learned_cost ...").items() if value is not None}
    return {"task": task, "rounds": rounds, "rows": rows, **stated}


def untrained(method: str, tokens: int, layers: int, fusion: int) -> tuple[learned.Modules, Any]:
    """Make modules of a method for the shape of LLaVA-1.5-7B with so many decoder layers."""
    sizes = {"width": WIDTH, "vision_width": VISION_WIDTH, "feature_layer": FEATURE_LAYER}
    shape = vtc.ModelShape(layers, family="llava", **sizes)
    if method != "llava-mini":
        return {"crosslmm": crosslmm, "vision-remember": vision_remember}[method].begin(shape, every=4)
    heads = {"heads": HEADS, "kv_heads": HEADS, "head_width": WIDTH // HEADS, "hidden": HIDDEN}
    decoder = learned.Decoder({**heads, "theta": 10000.0, "eps": 1e-5, "bias": False}, [])
    projector = llava_mini.Projector(VISION_WIDTH, WIDTH).state_dict()
    return llava_mini.begin(shape, projector, decoder, side=round(tokens**0.5), fusion=fusion)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    timed = verbs.add_parser("time", help="a reference model with modules")
    timed.add_argument("folders", nargs="+", type=Path)
    timed.add_argument("--task", choices=READERS, default="scenes")
    timed.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64], help="for methods without modules")
    timed.add_argument("--rounds", type=int, default=10)
    timed.add_argument("--table", type=Path, help="file for the result")
    making = verbs.add_parser("untrained", help="modules for the shape of LLaVA-1.5-7B")
    making.add_argument("method", choices=METHODS)
    making.add_argument("--tokens", type=int, default=16, help="of llava-mini, a square")
    making.add_argument("--layers", type=int, default=5, help="of the decoder that is measured (5)")
    making.add_argument("--fusion", type=int, default=4, help="of llava-mini: layers that fuse tokens and text (4)")
    making.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.verb == "untrained":
        made = untrained(arguments.method, arguments.tokens, arguments.layers, arguments.fusion)
        learned.save_modules(arguments.out, *made, torch.float16)
        print(f"{sum(weight.numel() for weight in made[1].parameters()):,} weights")
        return
    found = measure(arguments.task, arguments.folders, arguments.tokens, arguments.rounds)
    if arguments.table:
        arguments.table.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
