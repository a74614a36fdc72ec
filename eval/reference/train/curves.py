"""Accuracy against kept tokens on cached features: thousands of questions in minutes, and selections that know all.

    python -m eval.reference.train.curves runs/llava/checkpoint.pt --cache cache/ --out llava-curves-cached

Tokens are dropped between projector and decoder, positions kept, which is what a selector before the language model
does. Beside a few selectors written out here in their plainest form (the product's own are measured by
``python -m eval sweep``) stand the oracle that gives every object a token in turn, the anti-oracle that
avoids objects, and the model without any picture.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from eval.reference.train import models
from eval.reference.train.__main__ import TOKENIZER, Data
from eval.reference.train.packing import IGNORE, Packer
from eval.tasks.scenes import oracle
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import Thing

RATIOS = (0.5, 0.25, 0.11, 0.056)
Choice = Callable[[int, int], NDArray[np.int64]]
"""(scene, budget) -> ascending patch indices."""


def farthest_points(features: NDArray[np.float32], budget: int) -> NDArray[np.int64]:
    """Greedy max-min cosine distance, beginning with the token farthest from its nearest neighbour."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    nearest = distance + 9 * np.eye(len(unit))
    kept = [int(nearest.min(1).argmax())]
    reach = distance[kept[0]].copy()
    while len(kept) < budget:
        kept.append(int(reach.argmax()))
        reach = np.minimum(reach, distance[kept[-1]])
    return np.sort(np.asarray(kept))


def choices(
    features: NDArray[np.float16], cls: NDArray[np.float16], things: list[tuple[Thing, ...]]
) -> dict[str, Choice]:
    """The selectors, by name. ``features (scenes, 256, 384)``, ``cls (scenes, layers, heads, 256)``."""

    def generator(scene: int) -> np.random.Generator:
        return np.random.default_rng([7, scene])

    def top(scores: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
        return np.sort(np.argsort(-scores, kind="stable")[:budget])

    return {
        "random": lambda scene, budget: np.sort(generator(scene).permutation(256)[:budget]),
        "uniform": lambda _, budget: np.linspace(0, 255, budget).round().astype(np.int64),
        "largest norm": lambda s, budget: top(np.linalg.norm(features[s].astype(np.float64), axis=1), budget),
        "[CLS] attention, second-last layer": lambda s, budget: top(cls[s, 1].astype(np.float64).mean(0), budget),
        "[CLS] attention, last layer": lambda s, budget: top(cls[s, 2].astype(np.float64).mean(0), budget),
        "farthest point": lambda s, budget: farthest_points(features[s].astype(np.float32), budget),
        "oracle, round-robin": lambda s, budget: oracle.round_robin(things[s], budget, generator(s)),
        "anti-oracle": lambda s, budget: oracle.anti_oracle(things[s], budget, generator(s)),
    }


@torch.no_grad()
def accuracy(
    packed: models.PackedModel, packer: Packer, data: Data, scenes: int, choose: Choice | None, budget: int
) -> dict:
    """Accuracy by kind and over all with ``budget`` tokens kept (``choose`` None: all; budget 0: features zeroed)."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, scenes, 20):
        indices = np.arange(first, min(first + 20, scenes))
        rows = [ask(data.scenes[int(i)], 10) for i in indices]
        text = packer.pack(rows)
        with torch.autocast("cpu", torch.bfloat16):
            visual = packed.visual(data.batch(indices))
            if budget == 0:
                visual = torch.zeros_like(visual)
            kept = None
            if choose is not None:
                kept = torch.from_numpy(np.stack([choose(int(i), budget) for i in indices]))
                visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
            hidden, _ = packed.decode(visual, text, kept)
            logits = packed.head(hidden[text.labels != IGNORE])
        hit = torch.ones_like(text.labels, dtype=torch.bool)
        hit[text.labels != IGNORE] = logits.argmax(-1) == text.labels[text.labels != IGNORE]
        for row, questions in enumerate(rows):
            for number, question in enumerate(questions, 1):
                own = text.segments[row] == number
                if own.any():
                    hits[question.kind].append(bool(hit[row][own].all()))
    table = {kind: round(float(np.mean(values)), 4) for kind, values in sorted(hits.items())}
    everything = [hit for values in hits.values() for hit in values]
    return table | {"all": round(float(np.mean(everything)), 4), "questions": len(everything)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--all-tokens-only", action="store_true", help="just the accuracy with every token")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    _, packed = models.new_packed("llava", tokenizer)
    packed.load_state_dict(torch.load(arguments.checkpoint, weights_only=True)["model"])
    packed.eval()
    packer = Packer(tokenizer, len(packed.prefix), 192)
    data = Data.load("test", arguments.cache)
    cls = np.load(arguments.cache / "test" / "cls_attention.npy", mmap_mode="r")
    scenes = min(arguments.scenes, len(data.scenes))
    result = {
        "all tokens": {"1.0": accuracy(packed, packer, data, scenes, None, 256)},
        "no picture (visual tokens zeroed)": {"0": accuracy(packed, packer, data, scenes, None, 0)},
    }
    selectors = choices(data.shards[0][0][:, 0], cls, [scene.things for scene in data.scenes])
    for name, choose in () if arguments.all_tokens_only else selectors.items():
        result[name] = {str(r): accuracy(packed, packer, data, scenes, choose, round(256 * r)) for r in RATIOS}
        print(name, {ratio: values["all"] for ratio, values in result[name].items()}, flush=True)
    for name in ("all tokens", "no picture (visual tokens zeroed)"):
        print(name, result[name])
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
