"""Teach the shipped ``qwen2_5_vl`` long clips by a low-rank adapter of its decoder; the weights stay as they are.

The tower sees two frames at a time, so the tokens of a pair of frames do not depend on the others. Those of drawn clips
are cached by what they show, the background or one of the objects, and every training step puts them together anew:
other lengths, orders and numbers of appearances. Long clips are of fewer pixels, so that a step stays affordable.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import AutoTokenizer

import vtc_reference
from eval.reference.train import qwen_cache, qwen_scales
from eval.reference.train.cache import NO_PIXELS, PACKAGE, PATCH, TOKENIZER
from eval.reference.train.models import AUXILIARY_WEIGHT, HIDDEN, Example, PackedQwen
from eval.reference.train.packing import IGNORE, Packer
from eval.reference.train.qwen_tower import tower_tokens
from eval.tasks import long
from eval.tasks.clips.clip import SIDE, Actor, Clip, cells
from eval.tasks.scenes.questions import Question
from eval.tasks.scenes.sources import Split
from eval.tasks.scenes.vocabulary import COLOURS
from vtc.files import replacing

NAME: Final = "qwen2_5_vl-long"
SEED: Final = 0
RANK: Final = 16
SCALE: Final = 2.0
RATE: Final = 1.5e-3

SHARES: Final = {42: 0.15, 56: 0.45, 84: 0.2, 112: 0.2}
"""Sides of clips in pixels, and the share of the drawn clips that has each."""

STEPS: Final = {42: (32, 128), 56: (12, 64), 84: (12, 32), 112: (12, 24)}
"""Fewest and most pairs of frames by side."""

KINDS: Final = (*long.KINDS, "before", "times", "times")
"""Kinds of question about long clips; what is new is asked more often."""

QUESTIONS: Final = 9
TOKENS: Final = 2600  # visual tokens in a training step
OLD: Final = 5  # every so many steps are pictures and short clips, with the questions that the model knows
_BACKGROUNDS: Final = 4  # pairs of frames without any object that are kept of a clip
_LENGTH: Final = 120  # of packed questions
_MANY: Final = 12  # clips that the tower sees at a time
_ASKED: Final = 4  # layers behind which visual tokens must know what came before


@dataclass
class Parts:
    """Tokens of a clip's pairs of frames, ``side`` x ``side`` each.

    ``tokens (n, side^2, 256)`` float16; ``shows (n,)`` says which of ``actors`` each pair shows, -1 none; ``owned`` are
    the tokens that show an actor.
    """

    actors: tuple[Actor, ...]
    side: int
    tokens: Tensor
    shows: Tensor
    owned: list[Tensor]


def draw_parts(visual: Any, split: Split, seed: int, indices: Sequence[int], pixels: int) -> list[Parts]:
    """Draw clips of 64 frames, each object once, and run the tower on the pairs of frames that differ."""
    side, found, frames = pixels // PATCH, [], []
    for index in indices:
        clip = long.make_long_clip(seed, len(long.LENGTHS) * index, split)
        actors = tuple({actor.colour: actor for actor in clip.actors}.values())
        names = [actor.colour for actor in actors]
        shows = torch.full((clip.length // 2,), -1)
        for actor in clip.actors:
            shows[actor.first // 2 : actor.last // 2] = names.index(actor.colour)
        empty = (shows < 0).nonzero().flatten()[:: max(1, int((shows < 0).sum()) // _BACKGROUNDS)][:_BACKGROUNDS]
        kept = torch.cat([empty, (shows >= 0).nonzero().flatten()])
        pairs = torch.from_numpy(clip.frames).unflatten(0, (-1, 2))[kept]
        owned = []
        for actor in actors:
            shown = torch.zeros(1, (SIDE // PATCH) ** 2, 1)
            shown[0, list(cells(replace(actor, first=0, last=2), 2))] = 1.0
            share = qwen_scales.pooled(shown, 1, SIDE // PATCH, side)[0, :, 0]
            owned.append((share >= min(0.3, float(share.max()))).nonzero().flatten())
        frames.append(pairs if pixels == SIDE else qwen_scales.smaller(pairs, pixels))
        found.append(Parts(actors, side, torch.empty(0), shows[kept], owned))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tokens = tower_tokens(visual, torch.cat(frames)).half()
    for parts, own in zip(found, tokens.split([len(part) for part in frames]), strict=True):
        parts.tokens = own.clone()
    return found


def build(run: Path, clips: int = 960, old: int = 240, held: int = 48) -> None:
    """Cache tokens of the shipped tower: of long clips, and of scenes and short clips, ``old`` of each.

    ``RUN/long.pt`` has the long clips, ``RUN/train.pt`` the others, and ``RUN/held.pt`` long clips of the test split,
    at full size and at half.
    """
    run.mkdir(parents=True, exist_ok=True)
    visual = vtc_reference.load("qwen2_5_vl")[0].model.visual
    torch.save(visual.state_dict(), run / "tower.pt")
    start, sets = time.time(), {"held": [(112, held // 2), (56, held // 2)]}
    sets["long"] = [(pixels, round(clips * share)) for pixels, share in SHARES.items()]
    for name, wanted in sets.items():
        split: Split = "train" if name == "long" else "test"
        drawn: list[Parts] = []
        for pixels, count in wanted:
            for first in range(len(drawn), len(drawn) + count, _MANY):
                drawn += draw_parts(visual, split, 900 * (split == "test"), range(first, first + _MANY), pixels)
        torch.save([vars(parts) for parts in drawn], run / f"{name}.pt")
        print(f"{name}: {len(drawn)} clips, {time.time() - start:.0f} s", flush=True)
    qwen_scales.build(run, "train", old, old, seed=1)
    print(f"old: {time.time() - start:.0f} s", flush=True)


def load(file: Path) -> list[Parts]:
    """Return what :func:`build` wrote."""
    return [Parts(**fields) for fields in torch.load(file, weights_only=False)]


def compose(parts: Parts, steps: int, split: Split, number: int, rng: np.random.Generator) -> tuple[Clip, Tensor]:
    """Make a clip of so many pairs of frames, as :func:`~eval.tasks.long.make_long_clip` draws them, and its tokens."""
    length, chosen = 2 * steps, rng.permutation(len(parts.actors))
    most = length // (min(long.BRIEF) + 2)  # windows that fit
    chosen = chosen[: min(most, max(2, int(rng.choice(long.NUMBERS))))]
    again = min(int(rng.choice(long.REPEATS)) - 1, most - len(chosen))
    windows = rng.permutation(len(chosen) + again)
    wide = length // len(windows) // 2 * 2
    empty = (parts.shows < 0).nonzero().flatten().numpy()
    order, actors = torch.from_numpy(rng.choice(empty, steps)), []
    for place, which in enumerate(chosen):
        own = (parts.shows == int(which)).nonzero().flatten().numpy()
        for window in (windows[place], *(windows[len(chosen) :] if place == 0 else ())):
            first, last = long.span(int(window), wide, rng)
            order[first // 2 : last // 2] = torch.from_numpy(rng.choice(own, (last - first) // 2))
            actors.append(replace(parts.actors[int(which)], first=first, last=last))
    clip = Clip(NO_PIXELS, tuple(actors), length, split, SEED, number)
    return clip, parts.tokens[order].flatten(0, 1)


def shown(clip: Clip, parts: Parts) -> list[tuple[Actor, list[int]]]:
    """Each appearance with its visual tokens."""
    owned = {actor.colour: own for actor, own in zip(parts.actors, parts.owned, strict=True)}
    steps = torch.arange(clip.length // 2)[:, None] * parts.side**2
    return [
        (actor, (steps[actor.first // 2 : actor.last // 2] + owned[actor.colour]).flatten().tolist())
        for actor in clip.actors
    ]


@dataclass
class LongBatch:
    """Rows of one size, with what the visual tokens of objects must know.

    ``seen (B, N)`` numbers the appearances of the object that a token shows, 0 is background; ``earlier (B, N, 7)``
    says which other colours were seen before.
    """

    example: Example
    seen: Tensor
    earlier: Tensor
    asked: list[list[Question]]


def batch_of(
    rows: Sequence[Parts], steps: int, split: Split, packer: Any, rng: np.random.Generator, kinds: Sequence[str]
) -> LongBatch:
    """Compose a clip out of each row's parts and ask about it."""
    side, tokens, asked, actors = rows[0].side, [], [], []
    count = steps * side * side
    seen = torch.zeros(len(rows), count, dtype=torch.long)
    earlier = torch.zeros(len(rows), count, len(COLOURS))
    for row, parts in enumerate(rows):
        clip, own = compose(parts, steps, split, int(rng.integers(2**31)), rng)
        tokens.append(own.float())
        asked.append(list(long.ask(clip, QUESTIONS, kinds)))
        actors.append(shown(clip, parts))
        for actor, places in actors[-1]:
            before = [other for other in clip.actors if other.first < actor.first]
            seen[row, places] = 1 + sum(other.colour == actor.colour for other in before)
            for other in before:
                if other.colour != actor.colour:
                    earlier[row, places, list(COLOURS).index(other.colour)] = 1.0
    text = packer(PackedQwen.text_start((steps, side, side))).pack(asked, actors, count)
    labels = torch.zeros(len(rows), count, 4, dtype=torch.long)
    return LongBatch(Example(torch.stack(tokens), labels, text, (steps, side, side)), seen, earlier, asked)


class LowRank(nn.Module):
    """A weight with its change ``SCALE B A``; none at the beginning."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SCALE * (self.lora_B @ self.lora_A)


class PackedLong(PackedQwen):
    """The shipped model with low-rank changes of every matrix of its decoder, of embeddings and head.

    Heads that serve to train them are not shipped: pointers, how often an object was seen, and which colours before.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        nn.init.eye_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)
        for part in (self.decoder, self.head, self.adapter, self.places, self.events):
            part.requires_grad_(False)
        self.seen = nn.Linear(HIDDEN, max(long.REPEATS))
        self.earlier = nn.Linear(HIDDEN, len(COLOURS))
        self.changes: dict[str, LowRank] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and "visual" not in name:
                change = LowRank(module.weight)
                parametrize.register_parametrization(module, "weight", change)
                self.changes[name] = change
        self.states: list[Tensor] = []
        self.decoder.layers[_ASKED - 1].register_forward_hook(lambda _, __, out: self.states.append(out))

    def losses_of(self, batch: LongBatch) -> dict[str, Tensor]:
        """Losses on long clips, with their weights."""
        example = batch.example
        self.states.clear()
        logits, _, _ = self(example.features, example.text, example.grid)
        state = self.states.pop()
        objects = self.visual_states(state, example.text)[batch.seen > 0].float()
        known = functional.cross_entropy(self.seen(objects), batch.seen[batch.seen > 0] - 1)
        before = functional.binary_cross_entropy_with_logits(self.earlier(objects), batch.earlier[batch.seen > 0])
        return {
            "answer": self.answer_loss(logits, example.text),
            "pointing": AUXILIARY_WEIGHT * self.pointing_loss(state, example.text),
            "seen": AUXILIARY_WEIGHT * known,
            "earlier": AUXILIARY_WEIGHT * before,
        }

    def losses_of_old(self, example: Example) -> dict[str, Tensor]:
        """The answers' loss on pictures and short clips."""
        logits, _, _ = self(example.features, example.text, example.grid)
        self.states.clear()
        return {"old": self.answer_loss(logits, example.text)}

    def write(self, folder: Path) -> None:
        """Store the changes in float16, in PEFT's format."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, change in self.changes.items():
            a, b = (part.detach().half().contiguous() for part in (change.lora_A, change.lora_B))
            if name.endswith("embed_tokens"):  # PEFT looks up rows of an embedding's A
                weights[f"base_model.model.{name}.lora_embedding_A"] = b.t().contiguous()
                weights[f"base_model.model.{name}.lora_embedding_B"] = a.t().contiguous()
            else:
                weights[f"base_model.model.{name}.lora_A.weight"] = a
                weights[f"base_model.model.{name}.lora_B.weight"] = b
        with replacing(folder / "adapter_model.safetensors") as file:
            save_file(weights, file, metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": RANK,
            "lora_alpha": SCALE * RANK,
            "lora_dropout": 0.0,
            "bias": "none",
            # Layers of the tower have such names, too.
            "target_modules": r"model\.language_model\.(embed_tokens|.*_proj)|lm_head",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def accuracy(packed: PackedLong, held: Sequence[Parts], packer: Any) -> dict[str, tuple[float, int]]:
    """Share of right first words by kind, and of how many, on held-out clips of 64 and 128 frames."""
    packed.eval()
    right: dict[str, list[bool]] = {}
    rng = np.random.default_rng([SEED, 7])
    alike = [[parts for parts in held if parts.side == side] for side in dict.fromkeys(parts.side for parts in held)]
    for rows in [part[first : first + 4] for part in alike for first in range(0, len(part), 4)]:
        batch = batch_of(rows, 32 if rows[0].side > 4 else 64, "test", packer, rng, long.KINDS)
        text = batch.example.text
        with torch.autocast("cpu", torch.bfloat16):
            logits = packed(batch.example.features, text, batch.example.grid)[0]
        packed.states.clear()
        given = torch.full_like(text.labels, IGNORE)
        given[text.labels != IGNORE] = logits.argmax(-1)
        for row, questions in enumerate(batch.asked):
            for number, question in enumerate(questions, 1):
                places = ((text.segments[row] == number) & (text.labels[row] != IGNORE)).nonzero().flatten()
                if len(places):
                    good = bool(given[row, places[0]] == text.labels[row, places[0]])
                    right.setdefault(question.kind, []).append(good)
                    if question.kind == "times":
                        right.setdefault(f"times {question.answer}", []).append(good)
    packed.train()
    return {kind: (float(np.mean(each)), len(each)) for kind, each in sorted(right.items())}


def begin(run: Path) -> tuple[PackedLong, Any]:
    """The shipped model with changes that change nothing yet, and what packs questions for a position."""
    torch.manual_seed(SEED)
    words = AutoTokenizer.from_pretrained(TOKENIZER)
    model, _ = vtc_reference.load("qwen2_5_vl")
    packers: dict[int, Packer] = {}
    return PackedLong(model, words), lambda start: packers.setdefault(start, Packer(words, start, _LENGTH))


def train(
    run: Path, minutes: float = 35, steps: int = 100_000, folder: Path = PACKAGE / NAME
) -> list[dict[str, float]]:
    """Train the adapter on what :func:`build` cached, for so many minutes or steps, and store it in a folder."""
    packed, packer = begin(run)
    bank, held, old = load(run / "long.pt"), load(run / "held.pt"), qwen_cache.load(run / "train.pt")
    by_side = {pixels: [p for p in bank if p.side == pixels // PATCH] for pixels in SHARES}
    parameters = [p for p in packed.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    print(f"before: {accuracy(packed, held, packer)}", flush=True)
    start, history = time.time(), []
    for step in range(steps):
        share = max((time.time() - start) / (60 * minutes), step / steps)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, max(0.02, 2 * (1 - share)))
        rng = np.random.default_rng([SEED, 3, step])
        with torch.autocast("cpu", torch.bfloat16):
            if step % OLD == OLD - 1:
                losses = packed.losses_of_old(old_example(old, packer, step, rng))
            else:
                losses = packed.losses_of(draw_batch(by_side, share, packer, rng))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
        if (step + 1) % 50 == 0:
            recent = history[-50:]
            means = {name: np.mean([e[name] for e in recent if name in e]) for e in recent for name in e}
            told = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            print(f"step {step + 1}, {time.time() - start:.0f} s: {told}", flush=True)
        if (step + 1) % 150 == 0:
            print(f"held out: {accuracy(packed, held, packer)}", flush=True)
            packed.write(run / "adapter")
    print(f"after {len(history)} steps: {accuracy(packed, held, packer)}", flush=True)
    packed.write(folder)
    return history


def draw_batch(by_side: dict[int, list[Parts]], share: float, packer: Any, rng: np.random.Generator) -> LongBatch:
    """Draw clips of one size; at first short ones, all lengths after 40 % of the training."""
    pixels = int(rng.choice(list(SHARES), p=list(SHARES.values())))
    fewest, most = STEPS[pixels]
    most = fewest + round((most - fewest) * min(1.0, 0.2 + share / 0.4))
    steps = int(rng.integers(fewest, most + 1))
    parts = by_side[pixels]
    rows = max(2, min(8, TOKENS // (steps * (pixels // PATCH) ** 2)))
    chosen = [parts[int(i)] for i in rng.choice(len(parts), rows, replace=False)]
    return batch_of(chosen, steps, "train", packer, rng, KINDS)


def old_example(batches: Sequence[qwen_cache.Batch], packer: Any, step: int, rng: np.random.Generator) -> Example:
    """Half a cached batch of pictures or short clips, with fresh questions."""
    batch = batches[int(rng.integers(len(batches)))]
    half = len(batch.sources) // 2
    text = packer(PackedQwen.text_start(batch.grid)).pack(batch.ask(QUESTIONS, step, practice=True)[:half])
    return Example(batch.tokens[:half].float(), batch.labels[:half].long(), text, batch.grid, None)
