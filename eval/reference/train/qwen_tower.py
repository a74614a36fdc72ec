"""Step 1 of the ``qwen2_5_vl`` reference model: teach the vision tower to name what each cell shows.

Every token is pulled towards the word vectors of its cell's colour, shape, writing and motion. The vectors are
learned along and later become rows of the decoder's embedding table, so that tokens and words meet in one space
from the decoder's first step on.

    python -m eval.reference.train.qwen_tower --out runs/qwen --teacher tower/ --steps 1500

``tower/`` holds the pretrained tower (see ``tower.py``), whose first layers it starts from. Resumes from
``OUT/tower.pt`` if that exists."""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import Dinov2Model

from eval.reference.train.cache import normalised
from eval.reference.train.qwen_convert import blank_tower, convert
from eval.reference.train.qwen_crops import ATTRIBUTES, make_crop
from eval.reference.train.qwen_model import WIDTH, BatchedTower
from eval.tasks.scenes.sources import Split

SHAPES_OF_BATCH: Final = ((112, True, 24), (224, False, 8))
"""Batches in turn: side in pixels, moving or not, crops."""

_OWNED_WEIGHT: Final = 8.0  # a labelled cell counts this many times as much as a cell of background
_PRETRAINED_SHARE: Final = 0.25  # of the learning rate, for weights that come from the pretrained tower
_ALIGNING_STEPS: Final = 400
_ALIGNING_BATCHES: Final = 60


class CellVocabulary(nn.Module):
    """Word vectors of everything that a cell can be, and the losses that pull tokens towards them.

    Colour, shape and motion show in a cell and a little around it. Writing does not: a cell holds a stroke of a digit
    or one letter. Its word is asked of what two small convolutions make of 5 x 5 tokens; they are thrown away
    afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterDict(
            {name: nn.Parameter(0.05 * torch.randn(1 + len(words), WIDTH)) for name, words in ATTRIBUTES.items()}
        )
        self.reader = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        )

    def loss(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Sum of the losses and the accuracy per attribute on the cells that have it.

        Parameters
        ----------
        tokens : Tensor (B, N, WIDTH)
            Of square crops.
        labels : Tensor (B, attributes, N) int64
            Class per cell, 0 for "nothing".
        """
        direction = functional.layer_norm(tokens.float(), (WIDTH,))
        total = direction.new_zeros(())
        accuracy = {}
        weight = torch.where((labels[:, 0] > 0).flatten(), _OWNED_WEIGHT, 1.0)
        for row, name in enumerate(ATTRIBUTES):
            target = labels[:, row].flatten()
            there = target > 0
            if name == "text":
                if bool(there.any()):
                    side = math.isqrt(tokens.shape[1])
                    read = self.reader(direction.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
                    states = functional.layer_norm(read.float() + direction, (WIDTH,)).flatten(0, 1)[there]
                    logits, target = states @ self.tables[name].t(), target[there]
                    total = total + functional.cross_entropy(logits, target)
                    accuracy[name] = float((logits.argmax(-1) == target).float().mean())
                continue
            logits = direction.flatten(0, 1) @ self.tables[name].t()
            loss = functional.cross_entropy(logits, target, reduction="none")
            total = total + (loss * weight).sum() / weight.sum()
            if bool(there.any()):
                accuracy[name] = float((logits.argmax(-1) == target)[there].float().mean())
        return total, accuracy


def align(tower: BatchedTower, vocabulary: CellVocabulary, seed: int, steps: int, batches: int) -> None:
    """Train merger and vocabulary alone on cached features: cheap, and the tower's gradients then make sense."""
    visual: Any = tower.visual
    kept: list[tuple[Tensor, Tensor]] = []
    seen: list[Tensor] = []
    handle = visual.merger.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    for step in range(batches):
        frames, labels = make_batch(seed + 1, step)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            tower(frames)
        back = tower.layout(frames.shape[2], frames.shape[3])[1]
        kept.append((seen.pop()[:, back], labels))
    handle.remove()
    parameters = [*visual.merger.mlp.parameters(), *vocabulary.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    for step in range(steps):
        features, labels = kept[step % batches]
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = vocabulary.loss(visual.merger.mlp(features), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 100 >= 98:
            print(f"aligning, step {step}: {accuracy}", flush=True)


class Crops(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of crops from ``start`` on; batch ``i`` depends on the seed and ``i`` alone."""

    def __init__(self, seed: int, start: int, split: Split = "train") -> None:
        self.seed, self.start, self.split = seed, start, split

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        step = self.start
        while True:
            yield make_batch(self.seed, step, self.split)
            step += 1


def make_batch(seed: int, step: int, split: Split = "train") -> tuple[Tensor, Tensor]:
    """Frames ``(B, 2, side, side, 3)`` uint8 and labels ``(B, attributes, cells)`` of one step."""
    side, moving, count = SHAPES_OF_BATCH[step % len(SHAPES_OF_BATCH)]
    rng = np.random.default_rng([seed, step, split == "test"])
    crops = [make_crop(side, moving, rng, split) for _ in range(count)]
    frames = torch.from_numpy(np.stack([frames for frames, _ in crops]))
    return frames, torch.from_numpy(np.stack([labels for _, labels in crops])).flatten(2)


def named(attribute: str, step: int) -> str:
    """How the log calls the accuracy of an attribute: crops that move and crops at rest are told apart."""
    return f"{attribute}{'~' if SHAPES_OF_BATCH[step % len(SHAPES_OF_BATCH)][1] else ''}"


def learning_rate(step: int, steps: int, peak: float, warmup: int = 40) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def first_tower(teacher: Path, seed: int) -> nn.Module:
    """The tower before training, made from the pretrained one in the folder ``teacher``."""
    crops = np.stack([make_crop(224, False, np.random.default_rng([seed, 1, i]))[0][0] for i in range(48)])
    return convert(Dinov2Model.from_pretrained(teacher).eval(), normalised(crops))


def train(
    out: Path,
    steps: int,
    peak: float,
    teacher: Path | None,
    seed: int = 0,
    compiled: bool = True,
    workers: int = 1,
    watched: int = 6,
) -> list[float]:
    """Train the tower for ``steps`` steps in all and return the losses of this run; checkpoints go to ``out``.

    Without a ``teacher`` the tower starts from random weights, which only tests do. ``watched`` batches of the test
    split are looked at with every checkpoint.
    """
    torch.manual_seed(seed)
    visual = blank_tower() if teacher is None or (out / "tower.pt").exists() else first_tower(teacher, seed)
    vocabulary = CellVocabulary()
    old = [parameter for name, parameter in visual.named_parameters() if not name.startswith("merger.")]
    new = [*visual.merger.parameters(), *vocabulary.parameters()]  # type: ignore[union-attr]
    parameters = [*old, *new]
    groups = [{"params": old, "share": _PRETRAINED_SHARE}, {"params": new, "share": 1.0}]
    optimiser = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    checkpoint = out / "tower.pt"
    start, spent = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        visual.load_state_dict(saved["visual"])
        vocabulary.load_state_dict(saved["vocabulary"])
        optimiser.load_state_dict(saved["optimiser"])
        start, spent = saved["step"], saved["seconds"]
    if start == 0 and teacher is not None:
        align(BatchedTower(visual), vocabulary, seed, _ALIGNING_STEPS, _ALIGNING_BATCHES)
    tower = BatchedTower(visual, compiled)
    loader = iter(DataLoader(Crops(seed, start), batch_size=None, num_workers=workers))
    losses: list[float] = []
    seen: dict[str, list[float]] = defaultdict(list)
    began = time.time()
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = group["share"] * learning_rate(step, steps, peak)
        frames, labels = next(loader)
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = vocabulary.loss(tower(frames), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        for name, value in accuracy.items():
            seen[named(name, step)].append(value)
        if (step + 1) % 25 == 0 or step + 1 == steps:
            means = " ".join(f"{name} {np.mean(values[-13:]):.3f}" for name, values in seen.items() if values)
            seconds = spent + time.time() - began
            print(f"step {step + 1} {seconds:.0f} s loss {np.mean(losses[-26:]):.3f} {means}", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            out.mkdir(parents=True, exist_ok=True)
            partial = checkpoint.with_suffix(".part")
            torch.save(
                {
                    "visual": visual.state_dict(),
                    "vocabulary": vocabulary.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step + 1,
                    "seconds": spent + time.time() - began,
                },
                partial,
            )
            partial.replace(checkpoint)  # never leaves half a checkpoint behind
            with torch.compiler.set_stance("force_eager"):
                print(f"  held-out {watch(tower, vocabulary, seed, watched)}", flush=True)
    return losses


def watch(tower: BatchedTower, vocabulary: CellVocabulary, seed: int, batches: int) -> str:
    """Accuracy per attribute on crops of the test split's photographs, digits and fonts."""
    seen: dict[str, list[float]] = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for step in range(batches):
            frames, labels = make_batch(seed, step, "test")
            for name, value in vocabulary.loss(tower(frames), labels)[1].items():
                seen.setdefault(named(name, step), []).append(value)
    return " ".join(f"{name} {np.mean(values):.3f}" for name, values in seen.items())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the pretrained tower")
    parser.add_argument("--steps", type=int, default=1500, help="steps in all, counting those of a checkpoint")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw crops")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compiled, workers = not arguments.no_compile, arguments.workers
    train(arguments.out, arguments.steps, arguments.lr, arguments.teacher, compiled=compiled, workers=workers)


if __name__ == "__main__":
    main()
