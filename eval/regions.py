"""Measure what object tokens of a marked region tell: questions about "the object", with its box given.

    python -m eval.regions --cache cache/ --out eval/results/pixelrefer/table.json

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
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vtc
from eval.conditions import conditions
from eval.packed_reader import Reader, interval
from eval.reference.train.__main__ import Data
from eval.reference.train.packing import IGNORE, PackedText
from eval.tasks.scenes.questions import Question, ask
from eval.tasks.scenes.scene import Thing
from eval.tasks.scenes.vocabulary import CANVAS, GRID, PATCH
from vtc.files import check_writable, write_text

BUDGETS = (1, 4, 16)
"""Tokens of 256."""

_BATCH = 64

Keep = Callable[[Tensor, Thing, int], tuple[Tensor, Tensor]]
"""From projected features (N, d), the thing that is asked about and the number of the question to tokens (K, d) and
their places (K,)."""


def box_of(thing: Thing) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what is visible of a thing."""
    left, top, width, height = thing.box
    return max(0, left), max(0, top), min(CANVAS, left + width), min(CANVAS, top + height)


def in_box(thing: Thing) -> Tensor:
    """Return the indices of the tokens that the box of a thing touches."""
    left, top, right, bottom = box_of(thing)
    rows = torch.arange(top // PATCH, -(-bottom // PATCH))
    return (rows[:, None] * GRID + torch.arange(left // PATCH, -(-right // PATCH))).flatten()


def methods(count: int) -> dict[str, Keep]:
    """Return what is compared at `count` tokens."""

    def chosen(method: str, x: Tensor, number: int) -> tuple[Tensor, Tensor]:
        found = vtc.select(method, features=x, grid_thw=(1, GRID, GRID), keep_tokens=count, seed=number)
        return found.tokens(x), found.keep

    def objects(x: Tensor, thing: Thing, number: int) -> tuple[Tensor, Tensor]:
        with vtc.regions([box_of(thing)], (CANVAS, CANVAS)):
            return chosen("pixelrefer", x, number)

    def some_of_box(x: Tensor, thing: Thing, number: int) -> tuple[Tensor, Tensor]:
        inside = in_box(thing)
        picked = (2 * torch.arange(min(count, len(inside))) + 1) * len(inside) // (2 * min(count, len(inside)))
        return x[inside[picked]], inside[picked]

    return {
        "pixelrefer": objects,
        "tokens of the box": some_of_box,
        "uniform": lambda x, thing, number: chosen("uniform", x, number),
        "random": lambda x, thing, number: chosen("random", x, number),
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
    features: dict[int, Tensor] = {}
    for number, (index, question) in enumerate(asked):
        if index not in features:
            features = {index: reader.project(data.batch(np.array([index])))[0]}
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


def compare(reader: Reader, data: Data, per_scene: int) -> dict[str, Any]:
    """Measure every method at every budget."""
    asked = [
        (index, question)
        for index, scene in enumerate(data.scenes)
        for question in ask(scene, per_scene, kinds=("region",))
    ]
    every = torch.arange(GRID**2)
    tried = [(name, count, keep) for count in BUDGETS for name, keep in methods(count).items()]
    tried += [
        ("all tokens of the box", GRID**2, lambda x, thing, number: (x[in_box(thing)], in_box(thing))),
        ("all tokens", GRID**2, lambda x, thing, number: (x, every)),
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


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of cached scenes, test")
    parser.add_argument("--questions", type=int, default=4, help="at most so many about each scene (4)")
    parser.add_argument("--out", type=Path, required=True, help="file for the table")
    arguments = parser.parse_args(argv)
    check_writable(arguments.out)
    found = compare(Reader(), Data.load("test", arguments.cache), arguments.questions)
    write_text(arguments.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
