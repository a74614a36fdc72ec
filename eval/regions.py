"""Measure what object tokens of a marked region tell: questions about "the object", with its box given.

    python -m eval.regions samples --scenes 400 --seed 31 --out samples/
    vtc train pixelrefer --model reference:llava --data samples/samples.jsonl --steps 300 -o modules/
    python -m eval.regions compare --cache cache/ --modules modules/ --out eval/results/pixelrefer/table.json

Tower features come from `python -m eval.reference.train cache`. Beside `pixelrefer`: as many tokens of the box, evenly
spread over them and as they are; as many of the whole picture, evenly spread and drawn; and all tokens of the picture,
which do not say which object is meant. An answer counts as in `eval.packed_reader`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vtc
from eval.conditions import conditions
from eval.packed_reader import Reader, interval
from eval.reference.train.__main__ import Data
from eval.reference.train.packing import IGNORE, PackedText
from eval.tasks.scenes.questions import Question, ask
from eval.tasks.scenes.scene import Thing, make_scene
from eval.tasks.scenes.vocabulary import CANVAS, GRID, PATCH
from vtc.files import check_writable, write_text

BUDGETS = (1, 4, 16)
"""Tokens of 256."""

_BATCH = 64


class Seen(NamedTuple):
    """What the tower saw of a picture: features in front of the projector (N, D) and behind it (N, d)."""

    tower: Tensor
    projected: Tensor


Keep = Callable[[Seen, Thing, int], tuple[Tensor, Tensor]]
"""From a picture, the thing asked about and the number of the question to tokens (K, d) and their places (K,)."""


def box_of(thing: Thing) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what is visible of a thing."""
    left, top, width, height = thing.box
    return max(0, left), max(0, top), min(CANVAS, left + width), min(CANVAS, top + height)


def in_box(thing: Thing) -> Tensor:
    """Return the indices of the tokens that the box of a thing touches."""
    left, top, right, bottom = box_of(thing)
    rows = torch.arange(top // PATCH, -(-bottom // PATCH))
    return (rows[:, None] * GRID + torch.arange(left // PATCH, -(-right // PATCH))).flatten()


def methods(count: int, modules: Path | None = None) -> dict[str, Keep]:
    """Return what is compared at `count` tokens, trained `modules` of `pixelrefer` among it."""

    def chosen(method: str, seen: Seen, number: int, **more: Any) -> tuple[Tensor, Tensor]:
        found = vtc.select(
            method, features=seen.projected, grid_thw=(1, GRID, GRID), keep_tokens=count, seed=number, **more
        )
        return found.tokens(seen.projected), found.keep

    def objects(seen: Seen, thing: Thing, number: int) -> tuple[Tensor, Tensor]:
        with vtc.regions([box_of(thing)], (CANVAS, CANVAS)):
            return chosen("pixelrefer", seen, number)

    def trained(seen: Seen, thing: Thing, number: int) -> tuple[Tensor, Tensor]:
        with vtc.regions([box_of(thing)], (CANVAS, CANVAS)):
            return chosen("pixelrefer", seen, number, modules=str(modules), signals={vtc.PreProjector(): seen.tower})

    def some_of_box(seen: Seen, thing: Thing, number: int) -> tuple[Tensor, Tensor]:
        inside = in_box(thing)
        picked = (2 * torch.arange(min(count, len(inside))) + 1) * len(inside) // (2 * min(count, len(inside)))
        return seen.projected[inside[picked]], inside[picked]

    return {
        **({} if modules is None else {"pixelrefer, trained": trained}),
        "pixelrefer": objects,
        "tokens of the box": some_of_box,
        "uniform": lambda seen, thing, number: chosen("uniform", seen, number),
        "random": lambda seen, thing, number: chosen("random", seen, number),
    }


def shortest(text: PackedText) -> PackedText:
    """Cut the padding behind the longest row."""
    longest = int((text.segments > 0).sum(dim=1).max())
    cut = {name: getattr(text, name)[:, :longest] for name in ("ids", "labels", "positions", "segments")}
    return dataclasses.replace(text, **cut)


@torch.no_grad()
def right(reader: Reader, data: Data, asked: Sequence[tuple[int, Question]], keep: Keep) -> tuple[np.ndarray, float]:
    """Say which questions are answered exactly, and how many tokens were kept on average."""
    groups: dict[int, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
    features: dict[int, Seen] = {}
    for number, (index, question) in enumerate(asked):
        if index not in features:
            views = data.batch(np.array([index]))
            features = {index: Seen(views[0, -1].float(), reader.project(views)[0])}
        tokens, places = keep(features[index], data.scenes[index].things[question.targets[0]], number)
        groups[len(places)].append((number, tokens, places))
    good = np.zeros(len(asked))
    for group in groups.values():
        for first in range(0, len(group), _BATCH):
            part = group[first : first + _BATCH]
            text = shortest(reader.packer.pack([[asked[number][1]] for number, _, _ in part]))
            visual, places = (torch.stack([each[column] for each in part]) for column in (1, 2))
            logits = reader.answer(visual, lambda x, at=places: (x, at), text)
            where = text.labels != IGNORE
            hit = torch.zeros_like(text.labels)
            hit[where] = (logits.argmax(dim=-1) == text.labels[where]).long()
            for row, (number, _, _) in enumerate(part):
                good[number] = float(hit[row][where[row]].all())
    kept = sum(count * len(group) for count, group in groups.items()) / len(asked)
    return good, kept


def compare(reader: Reader, data: Data, per_scene: int, modules: Path | None = None) -> dict[str, Any]:
    """Measure every method at every budget."""
    asked = [
        (index, question)
        for index, scene in enumerate(data.scenes)
        for question in ask(scene, per_scene, kinds=("region",))
    ]
    every = torch.arange(GRID**2)
    tried = [(name, count, keep) for count in BUDGETS for name, keep in methods(count, modules).items()]
    tried += [
        ("all tokens of the box", GRID**2, lambda seen, thing, number: (seen.projected[in_box(thing)], in_box(thing))),
        ("all tokens", GRID**2, lambda seen, thing, number: (seen.projected, every)),
    ]
    scenes = np.array([index for index, _ in asked])
    rows = []
    for name, count, keep in tried:
        good, kept = right(reader, data, asked, keep)
        mean, low, high = interval([good[scenes == index] for index in np.unique(scenes)])
        rows.append({"method": name, "tokens": count, "kept": kept, "accuracy": mean, "low": low, "high": high})
        print(f"{name} {count}: {mean:.3f} ({low:.3f} to {high:.3f}), {kept:.1f} kept", flush=True)
    stated = {name: value for name, value in conditions("python -m eval.regions ...").items() if value is not None}
    return {"questions": len(asked), "scenes": len(np.unique(scenes)), "rows": rows, **stated}


def write_samples(folder: Path, scenes: int, seed: int, per_scene: int) -> int:
    """Write pictures of the training split with questions about boxes, as `vtc train` reads them; count these."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(scenes):
        scene = make_scene("train", seed, index)
        name = f"scene-{index:04d}.png"
        Image.fromarray(scene.image).save(folder / name)
        for question in ask(scene, per_scene, kinds=("region",)):
            box = list(box_of(scene.things[question.targets[0]]))
            lines.append({"image": name, "question": question.text, "answer": question.answer, "region": box})
    write_text(folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("samples", help="pictures and questions to train on")
    made.add_argument("--scenes", type=int, default=400)
    made.add_argument("--seed", type=int, default=31)
    measured = commands.add_parser("compare", help="measure all methods")
    measured.add_argument("--cache", type=Path, required=True, help="folder of cached scenes, test")
    measured.add_argument("--modules", type=Path, help="folder made by `vtc train pixelrefer`")
    for command, out in ((made, "folder for the samples"), (measured, "file for the table")):
        command.add_argument("--questions", type=int, default=4, help="at most so many about each scene (4)")
        command.add_argument("--out", type=Path, required=True, help=out)
    arguments = parser.parse_args(argv)
    if arguments.command == "samples":
        count = write_samples(arguments.out, arguments.scenes, arguments.seed, arguments.questions)
        print(f"{count} questions about {arguments.scenes} scenes in {arguments.out}")
        return
    check_writable(arguments.out)
    found = compare(Reader(), Data.load("test", arguments.cache), arguments.questions, arguments.modules)
    write_text(arguments.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
