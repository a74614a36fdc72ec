"""Run one stage of making the reference models; README.md has the stages in order.

The decoder's learning rate follows the share of ``--minutes`` used up, so a run ends on time on any machine. After each
pass over the data a checkpoint is written; with one in ``--run`` the training resumes, its clock as saved.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import vtc_reference
from eval.reference.train import (
    cache,
    export,
    qwen_cache,
    qwen_long,
    qwen_scales,
    qwen_tower,
    text_tower,
    tokenizer,
    tower,
)
from eval.reference.train.cache import TOKENIZER, Data
from eval.reference.train.labels import scene_labels
from eval.reference.train.models import Example, PackedImageModel, PackedModel, PackedQwen, new_packed
from eval.reference.train.packing import Packer
from eval.reference.train.qwen_cache import Batch
from eval.tasks.clips.clip import Clip
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import make_scene
from eval.tasks.scenes.vocabulary import KINDS
from vtc.files import replacing

PRACTICE = (*KINDS, "relation", "relation", "relation", "extreme", "place", "digit", "digit", "digit", "reading")
"""Kinds of question in training on scenes: what takes longest to learn is asked more often."""

SEED: Final = 0
SCENES_PER_STEP: Final = 8
QUESTIONS: Final = 18  # per image or clip and pass


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one model.

    ``constant``: share of the time after which the learning rate descends; ``word_steps``, ``word_batch``: steps and
    scenes per step of :func:`train_projector`.
    """

    model: str
    rate: float
    constant: float = 0.55
    from_llava: bool = True
    word_steps: int = 0
    word_batch: int = 0


RECIPES: Final = {
    "llava": Recipe("llava", 8e-4, from_llava=False, word_steps=1200, word_batch=48),
    "llava-continued": Recipe("llava", 5e-4),
    "internvl": Recipe("internvl", 5e-4, word_steps=400, word_batch=32),
    "qwen2_5_vl": Recipe("qwen2_5_vl", 6e-4, constant=0.5),
    "qwen2_5_vl-scales": Recipe("qwen2_5_vl", 4e-4, constant=0.5, from_llava=False),
}


def learning_rate(recipe: Recipe, step: int, share: float, warmup: int = 100) -> float:
    """Warm-up by steps, constant for a share of the time, then a linear descent to 2 % of the peak."""
    descent = 1.0 if share < recipe.constant else max(0.02, (1 - share) / (1 - recipe.constant))
    return recipe.rate * min(1.0, (step + 1) / warmup) * descent


def fit(
    packed: PackedModel,
    examples: Callable[[int], Iterable[Example]],
    recipe: Recipe,
    minutes: float,
    checkpoint: Path,
    max_steps: int | None = None,
) -> list[float]:
    """Train on ``examples(epoch)``, epochs from 1, for ``minutes`` or ``max_steps``; returns the answer losses."""
    parameters = [p for p in packed.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.05)
    step, used, epoch = 0, 0.0, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        packed.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, used, epoch = saved["step"], saved["used"], saved["epoch"]
    start, history = time.time() - used, []
    done = False
    while not done:
        epoch += 1
        for example in examples(epoch):
            used = time.time() - start
            share = used / (60 * minutes)
            if done := share >= 1 or len(history) == max_steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step, share)
            with torch.autocast("cpu", torch.bfloat16):
                losses = packed.losses(example)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            history.append(losses["answer"].item())
            if step % 50 == 0:
                print(f"step {step}, {used:.0f} s, answer loss {np.mean(history[-50:]):.3f}", flush=True)
        state = {"model": packed.state_dict(), "optimizer": optimizer.state_dict()}
        with replacing(checkpoint) as file:
            torch.save(state | {"step": step, "used": used, "epoch": epoch}, file)
    return history


def scene_examples(data: Data, packer: Packer, epoch: int) -> Iterator[Example]:
    """One pass over the cached scenes in random order, with fresh questions."""
    order = np.random.default_rng([SEED, epoch]).permutation(len(data.scenes))
    for first in range(0, len(order) - SCENES_PER_STEP + 1, SCENES_PER_STEP):
        indices = np.sort(order[first : first + SCENES_PER_STEP])
        scenes = [data.scenes[i] for i in indices]
        questions = [ask(scene, QUESTIONS, seed=epoch, kinds=PRACTICE) for scene in scenes]
        text = packer.pack(questions, [[(thing, thing.patches) for thing in scene.things] for scene in scenes])
        yield Example(data.batch(indices), patch_labels(data, indices), text)


def patch_labels(data: Data, indices: np.ndarray) -> Tensor:
    """Classes of the patches of these scenes, ``(n, 256, 4)``."""
    return torch.from_numpy(np.stack([scene_labels(data.scenes[i].things) for i in indices]))


def qwen_examples(
    batches: list[Batch], packer: Callable[[int], Packer], epoch: int, second_turns: bool = False
) -> Iterator[Example]:
    """One pass over the cached batches in random order, with fresh questions; ``packer`` makes one for a position.

    With ``second_turns`` every second batch is asked in conversations of two turns.
    """
    for index in np.random.default_rng([SEED, epoch - 1]).permutation(len(batches)):
        batch = batches[index]
        things = [source.actors if isinstance(source, Clip) else source.things for source in batch.sources]
        shown = [list(zip(row, owned, strict=True)) for row, owned in zip(things, batch.owned, strict=True)]
        questions = batch.ask(QUESTIONS, epoch, practice=True)
        turns = 1 + (index + epoch) % 2 if second_turns else 1
        text = packer(PackedQwen.text_start(batch.grid)).pack(questions, shown, batch.tokens.shape[1], turns)
        features, labels = batch.tokens.float(), batch.labels.long()
        yield Example(features, labels, text, batch.grid, batch.events)


@torch.no_grad()
def teacher_tokens(projector: nn.Module, packed: PackedImageModel, features: Tensor) -> Tensor:
    """What ``llava``'s projector makes of the patches that each visual token shows: their mean ``(B, N, HIDDEN)``.

    ``features (B, views, 256, 384)``, the whole scene last.
    """
    tokens: Tensor = projector(features[:, -1].float())
    return tokens[:, packed.sources].mean(2)


def start_from_llava(packed: PackedModel, name: str) -> nn.Module | None:
    """Take over the decoder of the shipped ``llava``; its projector too, or return it where it can only be imitated."""
    llava, _ = vtc_reference.load("llava")
    found = packed.decoder.load_state_dict(llava.model.language_model.state_dict(), strict=False)
    if found.unexpected_keys or not all(key.endswith("_proj.bias") for key in found.missing_keys):
        raise ValueError(f"the decoder of llava does not fit {name}: {found}")
    with torch.no_grad():
        for key in found.missing_keys:  # biases of queries, keys and values, which only Qwen2.5-VL has
            packed.decoder.get_parameter(key).zero_()
    packed.head.load_state_dict(llava.lm_head.state_dict())
    if name == "llava":
        packed.projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
        packed.unfold()
        return None
    projector: nn.Module = llava.model.multi_modal_projector
    return projector


@torch.no_grad()
def fit_scale(packed: PackedModel, visual: Tensor, labels: Tensor) -> None:
    """Set the temperature of the word loss, which is not shipped, to the best of a few on these visual tokens."""
    losses = {}
    for candidate in (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0):
        packed.scale.fill_(candidate)
        losses[candidate] = packed.word_loss(visual, labels).item()
    packed.scale.fill_(min(losses, key=lambda candidate: losses[candidate]))


@torch.no_grad()
def start_from_shipped(packed: PackedQwen) -> None:
    """Take over the decoder of the shipped ``qwen2_5_vl``, whose adapter is in its tower already."""
    shipped, _ = vtc_reference.load("qwen2_5_vl")
    packed.decoder.load_state_dict(shipped.model.language_model.state_dict())
    packed.head.load_state_dict(shipped.lm_head.state_dict())
    nn.init.eye_(packed.adapter.weight)
    nn.init.zeros_(packed.adapter.bias)


def train_projector(packed: PackedImageModel, data: Data, recipe: Recipe, teacher: nn.Module | None) -> None:
    """Train the projector alone by the word loss, and from scratch the word embeddings with it.

    A step costs a tenth of a full one, and a decoder that starts on tokens which already carry their words skips a long
    plateau. The tokens of another model's projector are pulled towards those of the ``teacher``.
    """
    parameters = list(packed.projector.parameters())
    if not recipe.from_llava:
        parameters += [packed.decoder.embed_tokens.weight, packed.scale]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng([SEED, 0, 1])
    for step in range(recipe.word_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / recipe.word_steps)
        indices = np.sort(rng.choice(len(data.scenes), recipe.word_batch, replace=False))
        features = data.batch(indices)
        with torch.autocast("cpu", torch.bfloat16):
            visual = packed.visual(features)
            loss = packed.word_loss(visual, packed.token_labels(patch_labels(data, indices)))
            if teacher is not None:
                wanted = teacher_tokens(teacher, packed, features).float()
                loss = loss + (visual.float() - wanted).square().mean() / wanted.var()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def fit_adapter(packed: PackedQwen, batches: list[Batch], count: int = 40) -> float:
    """Fit the adapter by ridge regression of ``llava``'s tokens of the same scenes; returns the variance explained."""
    square = [batch for batch in batches if batch.grid == (1, 16, 16)][:count]
    images = [[make_scene(s.split, s.seed, s.index).image for s in batch.sources] for batch in square]
    teacher = qwen_tower.Teacher()
    wanted = torch.cat([teacher.tokens(torch.from_numpy(np.stack(part))[:, None]) for part in images])
    tokens = torch.cat([batch.tokens.float() for batch in square])
    labels = torch.cat([batch.labels.long() for batch in square])
    mean, goal = tokens.mean((0, 1)), wanted.mean((0, 1))
    flat = (tokens - mean).flatten(0, 1)
    gram = flat.T @ flat
    gram = gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, flat.T @ (wanted - goal).flatten(0, 1)).T
    packed.adapter.weight.copy_(weight)
    packed.adapter.bias.copy_(goal - weight @ mean)
    fitted = packed.adapter(tokens)
    fit_scale(packed, fitted, labels)
    return 1.0 - float((fitted - wanted).square().sum() / (wanted - goal).square().sum())


def train(recipe: str, cached: Path, run: Path, minutes: float) -> None:
    """Train projector and decoder on cached features, until ``minutes`` of training are used up in all."""
    torch.manual_seed(SEED)
    run.mkdir(parents=True, exist_ok=True)
    begin = begin_qwen if RECIPES[recipe].model == "qwen2_5_vl" else begin_image_model
    packed, examples = begin(RECIPES[recipe], cached, (run / "checkpoint.pt").exists())
    fit(packed, examples, RECIPES[recipe], minutes, run / "checkpoint.pt")


Begun = tuple[PackedModel, Callable[[int], Iterable[Example]]]


def begin_image_model(recipe: Recipe, cached: Path, resumed: bool) -> Begun:
    """Prepare ``llava`` or ``internvl`` and its examples out of ``CACHED/train*``."""
    data, words = Data.load("train", cached), AutoTokenizer.from_pretrained(TOKENIZER)
    packed = new_packed(recipe.model, words)[1]
    packed.prepare(data.batch(np.arange(0, len(data.scenes), max(1, len(data.scenes) // 200))))
    if not resumed:
        teacher = None
        if recipe.from_llava:
            teacher = start_from_llava(packed, recipe.model)
            indices = np.arange(min(32, len(data.scenes)))
            features, labels = data.batch(indices), packed.token_labels(patch_labels(data, indices))
            with torch.no_grad():
                visual = packed.visual(features) if teacher is None else teacher_tokens(teacher, packed, features)
            fit_scale(packed, visual, labels)
        train_projector(packed, data, recipe, teacher)
    packer = Packer(words, len(packed.before) + len(packed.sources) + len(packed.after), 175)
    return packed, lambda epoch: scene_examples(data, packer, epoch)


def begin_qwen(recipe: Recipe, cached: Path, resumed: bool) -> Begun:
    """Prepare ``qwen2_5_vl`` and its examples out of ``CACHED/train.pt``."""
    batches, words = qwen_cache.load(cached / "train.pt"), AutoTokenizer.from_pretrained(TOKENIZER)
    packed = new_packed(recipe.model, words)[1]
    if not resumed and recipe.from_llava:
        start_from_llava(packed, recipe.model)
        print(f"the adapter explains {fit_adapter(packed, batches):.3f} of the variance of llava's tokens")
    elif not resumed:
        start_from_shipped(packed)
        fit_scale(packed, batches[0].tokens.float(), batches[0].labels.long())
    packer = lru_cache(lambda start: Packer(words, start, 176))
    return packed, lambda epoch: qwen_examples(batches, packer, epoch, second_turns=not recipe.from_llava)


STAGES: Final[dict[str, Callable[..., None]]] = {
    "tower": tower.convert,
    "tokenizer": tokenizer.train,
    "cache": cache.build,
    "decoder": train,
    "qwen-tower": qwen_tower.train,
    "qwen-cache": qwen_cache.build,
    "qwen-scales-tower": qwen_scales.train,
    "qwen-scales-cache": qwen_scales.build,
    "qwen-scales-export": qwen_scales.blend,
    "qwen-long-cache": qwen_long.build,
    "qwen-long": qwen_long.train,
    "export": export.export,
    "text-tower": text_tower.run,
    "text-tower-rank": text_tower.rank,
}


def main() -> None:
    """Command line: a stage's arguments are options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True)
    for name, stage in STAGES.items():
        command = commands.add_parser(name, help=(stage.__doc__ or "").splitlines()[0])
        for option in inspect.signature(stage, eval_str=True).parameters.values():
            if option.annotation is bool:
                command.add_argument(f"--{option.name}", action="store_true")
                continue
            kind = option.annotation if option.annotation in (int, float, Path) else str
            required = option.default is option.empty
            command.add_argument(f"--{option.name}", type=kind, required=required, default=option.default)
    arguments = vars(parser.parse_args())
    STAGES[arguments.pop("stage")](**arguments)


if __name__ == "__main__":
    main()
