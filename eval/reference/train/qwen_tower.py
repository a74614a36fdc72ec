"""Step 1 of the ``qwen2_5_vl`` reference model: teach the vision tower to say what the ``llava`` model's tower says.

It starts from the first layers of that tower, converted in closed form. On pictures at rest every token is pulled
towards the visual token that the shipped ``llava`` makes of the same patch, so that its decoder can be taken over. What
that model cannot know, motion, is learned from labels: tokens are pulled towards the word vectors of their cell's
colour, shape, writing and motion, the decoder's own where it has them.

    python -m eval.reference.train.qwen_tower --out runs/qwen --steps 1500

Resumes from ``OUT/tower.pt`` if that exists."""

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
from transformers import AutoTokenizer

import vtc_reference
from eval.reference.train.cache import normalised, tower_features
from eval.reference.train.qwen_convert import blank_tower, convert
from eval.reference.train.qwen_crops import ATTRIBUTES, make_crop
from eval.reference.train.qwen_model import TOKENIZER, WIDTH, BatchedTower
from eval.tasks.scenes.sources import Split

SHAPES_OF_BATCH: Final = ((112, True, 24), (224, False, 8), (224, False, 8), (224, False, 8))
"""Batches in turn: side in pixels, moving or not, crops. Motion is learned sooner than reading."""

_OWNED_WEIGHT: Final = 8.0  # a labelled cell counts this many times as much as a cell of background
_PRETRAINED_SHARE: Final = 0.25  # of the learning rate, for weights that come from the pretrained tower
_ALIGNING_STEPS: Final = 400
_ALIGNING_BATCHES: Final = 60
_LIKENESS_WEIGHT: Final = 4.0


class Teacher:
    """The visual tokens of the shipped ``llava`` model, less what they say on average about the place they are at.

    The tower that learns from it has no way of knowing places; its decoder's positions carry them.
    """

    def __init__(self) -> None:
        self.llava, _ = vtc_reference.load("llava")
        self.llava.requires_grad_(False)
        self.places = torch.zeros(256, WIDTH)
        self.spread = 1.0

    @torch.no_grad()
    def tokens(self, frames: Tensor) -> Tensor:
        """Tokens ``(B, 256, WIDTH)`` of ``frames (B, T, 224, 224, 3)``, whose first frame is looked at."""
        model = self.llava.model
        features = tower_features(model.vision_tower, normalised(frames[:, 0].numpy()))[0]
        tokens: Tensor = model.multi_modal_projector(features.float()) - self.places
        return tokens

    def prepare(self, tokens: Tensor) -> None:
        """Find what is to be taken off, from the tokens ``(n, 256, WIDTH)`` of many pictures."""
        mean = tokens.mean(0)
        self.places = mean - mean.mean(0)
        self.spread = float((tokens - mean).square().mean())

    def loss(self, tokens: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        """Squared distance of ``tokens (B, 256, WIDTH)`` from what is ``wanted``, as a share of the spread of those."""
        weight = torch.where(labels[:, 0] > 0, _OWNED_WEIGHT, 1.0)
        error = (tokens.float() - wanted).square().mean(-1)
        return (error * weight).sum() / weight.sum() / self.spread

    def reading(self, tokens: Tensor, labels: Tensor, words: Tensor) -> tuple[Tensor, float]:
        """Loss and accuracy of what this model's decoder reads, half-way up, off another tower's tokens.

        Its first layers have learned to read words and digits off tokens of strokes; here they teach a tower which
        strokes it has to tell. ``words (classes, WIDTH)`` are the vectors of what can be written.
        """
        wanted = labels[:, list(ATTRIBUTES).index("text")]
        there = wanted > 0
        if not bool(there.any()):
            return tokens.new_zeros(()), float("nan")
        decoder = self.llava.model.language_model
        start = decoder.embed_tokens.weight[self.llava.config.text_config.bos_token_id].expand(len(tokens), 1, -1)
        hidden = torch.cat([start, tokens.float() + self.places], 1)
        rotary = decoder.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])
        for layer in decoder.layers[: len(decoder.layers) // 2]:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        logits = (functional.layer_norm(hidden[:, 1:].float(), (WIDTH,))[there] @ words.t()).float()
        return functional.cross_entropy(logits, wanted[there]), float(
            (logits.argmax(-1) == wanted[there]).float().mean()
        )


class CellVocabulary(nn.Module):
    """Word vectors of everything that a cell can be, and the losses that pull tokens towards them.

    Colour, shape and motion show in a cell and a little around it. Writing does not: a cell holds a stroke of a digit
    or one letter, and only a reader of many tokens can be asked for the word (see :meth:`Teacher.reading`)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterDict(
            {name: nn.Parameter(0.05 * torch.randn(1 + len(words), WIDTH)) for name, words in ATTRIBUTES.items()}
        )

    @torch.no_grad()
    def begin_with(self, llava: Any, scale: float = 1.2) -> None:
        """Take the decoder's own word vectors; what moves has no words there yet."""
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        embeddings = llava.model.language_model.embed_tokens.weight
        for name in ("colour", "shape", "text"):
            words = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ATTRIBUTES[name]]
            self.tables[name].copy_(scale * embeddings[[tokenizer.pad_token_id, *words]])
            self.tables[name].requires_grad_(False)

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
                continue
            logits = direction.flatten(0, 1) @ self.tables[name].t()
            loss = functional.cross_entropy(logits, target, reduction="none")
            total = total + (loss * weight).sum() / weight.sum()
            if bool(there.any()):
                accuracy[name] = float((logits.argmax(-1) == target)[there].float().mean())
        return total, accuracy


def lesson(
    teacher: Teacher | None, vocabulary: CellVocabulary, tokens: Tensor, labels: Tensor, wanted: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch, and what the log says about it."""
    loss, accuracy = vocabulary.loss(tokens, labels)
    if teacher is not None and wanted is not None:
        unlike = teacher.loss(tokens, wanted, labels)
        accuracy["likeness"] = 1.0 - float(unlike.detach())
        reading, accuracy["text"] = teacher.reading(tokens, labels, vocabulary.tables["text"])
        loss = loss + _LIKENESS_WEIGHT * unlike + reading
    return loss, accuracy


def align(
    tower: BatchedTower, vocabulary: CellVocabulary, teacher: Teacher, seed: int, steps: int, batches: int
) -> None:
    """Train merger and vocabulary alone on cached features: cheap, and the tower's gradients then make sense."""
    visual: Any = tower.visual
    kept: list[tuple[Tensor, Tensor, Tensor | None]] = []
    seen: list[Tensor] = []
    handle = visual.merger.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    for step in range(batches):
        frames, labels = make_batch(seed + 1, step)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            tower(frames)
        back = tower.layout(frames.shape[2], frames.shape[3])[1]
        kept.append((seen.pop()[:, back], labels, teacher.tokens(frames) if frames.shape[2] == 224 else None))
    handle.remove()
    teacher.prepare(torch.cat([wanted for *_, wanted in kept if wanted is not None]))
    kept = [(f, labels, None if wanted is None else wanted - teacher.places) for f, labels, wanted in kept]
    parameters = [*visual.merger.mlp.parameters(), *vocabulary.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    for step in range(steps):
        features, labels, wanted = kept[step % batches]
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = lesson(teacher, vocabulary, visual.merger.mlp(features), labels, wanted)
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


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def first_tower(teacher: Teacher, seed: int) -> nn.Module:
    """The tower before training, made from the teacher's."""
    crops = np.stack([make_crop(224, False, np.random.default_rng([seed, 1, i]))[0][0] for i in range(48)])
    return convert(teacher.llava.model.vision_tower, normalised(crops))


def train(
    out: Path,
    steps: int,
    peak: float,
    teacher: Teacher | None,
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
        if teacher is not None:
            teacher.places, teacher.spread = saved["places"], saved["spread"]
    if start == 0 and teacher is not None:
        vocabulary.begin_with(teacher.llava)
        align(BatchedTower(visual), vocabulary, teacher, seed, _ALIGNING_STEPS, _ALIGNING_BATCHES)
    tower = BatchedTower(visual, compiled)
    loader = iter(DataLoader(Crops(seed, start), batch_size=None, num_workers=workers))
    losses: list[float] = []
    seen: dict[str, list[float]] = defaultdict(list)
    began = time.time()
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = group["share"] * learning_rate(step, steps, peak)
        frames, labels = next(loader)
        wanted = None if teacher is None or frames.shape[2] != 224 else teacher.tokens(frames)
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = lesson(teacher, vocabulary, tower(frames), labels, wanted)
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
                }
                | ({} if teacher is None else {"places": teacher.places, "spread": teacher.spread}),
                partial,
            )
            partial.replace(checkpoint)  # never leaves half a checkpoint behind
            with torch.compiler.set_stance("force_eager"):
                print(f"  held-out {watch(tower, vocabulary, teacher, seed, watched)}", flush=True)
    return losses


def watch(tower: BatchedTower, vocabulary: CellVocabulary, teacher: Teacher | None, seed: int, batches: int) -> str:
    """Accuracy per attribute on crops of the test split's photographs, digits and fonts."""
    seen: dict[str, list[float]] = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for step in range(batches):
            frames, labels = make_batch(seed, step, "test")
            wanted = None if teacher is None or frames.shape[2] != 224 else teacher.tokens(frames)
            for name, value in lesson(teacher, vocabulary, tower(frames), labels, wanted)[1].items():
                seen.setdefault(named(name, step), []).append(value)
    return " ".join(f"{name} {np.mean(values):.3f}" for name, values in seen.items())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=1500, help="steps in all, counting those of a checkpoint")
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw crops")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compiled, workers = not arguments.no_compile, arguments.workers
    train(arguments.out, arguments.steps, arguments.lr, Teacher(), compiled=compiled, workers=workers)


if __name__ == "__main__":
    main()
