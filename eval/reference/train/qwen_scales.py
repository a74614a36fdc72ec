"""Train ``qwen2_5_vl`` on for pictures and clips of several scales, beginning with the shipped weights.

A user can always send a smaller picture, so a model that is to say what that costs must know small pictures. The tower
learns to give, for a smaller picture, the means of the tokens that the shipped tower gives for the same patches at full
size; the decoder then goes on with all scales, large pictures with little in them, and second turns.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import vtc_reference
from eval.reference.train import qwen_cache
from eval.reference.train.cache import PACKAGE, PATCH
from eval.reference.train.export import export
from eval.reference.train.qwen_cache import Batch
from eval.reference.train.qwen_crops import make_crop
from eval.reference.train.qwen_tower import tower_tokens
from eval.tasks.scenes.sources import Split

SIDES: Final = (56, 70, 84, 112, 126, 154, 182)
"""Sides in pixels to which pictures of 224 x 224 are made smaller: 6 to 66 % of the tokens."""

CLIP_SIDES: Final = (42, 56, 84)
"""The same for clips of 112 x 112."""

LARGE: Final = ((336, 336), (280, 336), (336, 280))
"""Height and width of large pictures, in which a scene takes half of the place."""

SEED: Final = 0
RATE: Final = 2e-4
CROPS: Final = 8
_OWNED: Final = 0.3
_OWNED_WEIGHT: Final = 8.0


def smaller(frames: Tensor, side: int) -> Tensor:
    """Resample ``frames (B, T, S, S, 3)`` uint8 to ``side`` pixels, as the harness makes pictures smaller."""
    flat = frames.flatten(0, 1).numpy()
    small = [np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)) for frame in flat]
    return torch.from_numpy(np.stack(small)).unflatten(0, frames.shape[:2])


def pooled(values: Tensor, time: int, before: int, after: int) -> Tensor:
    """Average ``values (B, time * before^2, C)`` over the areas of a coarser grid, ``(B, time * after^2, C)``."""
    maps = values.unflatten(1, (time, before, before)).flatten(0, 1).permute(0, 3, 1, 2)
    small = functional.interpolate(maps, size=(after, after), mode="area")
    return small.permute(0, 2, 3, 1).unflatten(0, (-1, time)).flatten(1, 3)


def pooled_classes(labels: Tensor, time: int, before: int, after: int) -> Tensor:
    """Give each token of the coarser grid its most frequent class but 0, if others than 0 fill enough of it.

    ``labels (B, time * before^2)`` of classes.
    """
    share = pooled(functional.one_hot(labels.long()).float(), time, before, after)[..., 1:]
    if not share.shape[-1]:
        return torch.zeros(share.shape[:-1], dtype=labels.dtype)
    return ((share.argmax(-1) + 1) * (share.sum(-1) >= _OWNED)).to(labels.dtype)


def scaled(frames: Tensor, batch: Batch, side: int) -> tuple[Tensor, Batch]:
    """Make the square frames and the description of a batch smaller; questions stay the same."""
    time, before, _ = batch.grid
    after = side // PATCH
    owned = []
    for row in batch.owned:
        maps = torch.zeros(len(row), time * before * before)
        for number, tokens in enumerate(row):
            maps[number, list(tokens)] = 1.0
        share = pooled(maps[..., None], time, before, after)[..., 0]
        found = [(part >= min(_OWNED, float(part.max()))).nonzero().flatten().tolist() for part in share]
        owned.append([tuple(tokens) for tokens in found])
    labels = torch.stack([pooled_classes(part, time, before, after) for part in batch.labels.unbind(-1)], -1)
    events = None if batch.events is None else pooled_classes(batch.events, time, before, after)
    return smaller(frames, side), replace(batch, grid=(time, after, after), owned=owned, labels=labels, events=events)


def fit(visual: Any, teacher: Any, steps: int) -> list[float]:
    """Train the tower in place; returns the losses.

    Of four steps, two are on smaller pictures, one is on pictures of full size and one on crops in motion: there the
    tower is to stay as it was.
    """
    parameters = list(visual.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    for step in range(steps):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30, max(0.02, 2 * (1 - share)))
        rng = np.random.default_rng([SEED, 2, step])
        moving, resting = step % 4 == 3, step % 4 == 2
        full = 112 if moving else 224
        crops = [make_crop(full, moving, rng) for _ in range(2 * CROPS if moving else CROPS)]
        frames = torch.from_numpy(np.stack([frames for frames, _ in crops]))
        labels = torch.from_numpy(np.stack([labels for _, labels in crops])).flatten(2)[:, 0]
        side = full if moving or resting else SIDES[int(rng.integers(len(SIDES)))]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = tower_tokens(teacher, frames).float()
            variance = float((wanted - wanted.mean((0, 1))).square().mean())
            if side != full:
                wanted = pooled(wanted, 1, full // PATCH, side // PATCH)
                labels = pooled_classes(labels, 1, full // PATCH, side // PATCH)
                frames = smaller(frames, side)
            tokens = tower_tokens(visual, frames)
            weight = torch.where(labels > 0, _OWNED_WEIGHT, 1.0)
            loss = ((tokens.float() - wanted).square().mean(-1) * weight).sum() / weight.sum() / variance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            last = {name: losses[first::4][-5:] for first, name in ((0, "smaller"), (2, "full size"), (3, "motion"))}
            print(f"step {step + 1}: " + ", ".join(f"{k} {np.mean(v):.3f}" for k, v in last.items()), flush=True)
    return losses


def train(run: Path, steps: int = 300) -> None:
    """Train the tower of the shipped qwen2_5_vl on smaller pictures; writes ``RUN/tower.pt``."""
    torch.manual_seed(SEED)
    visual = vtc_reference.load("qwen2_5_vl")[0].model.visual
    fit(visual, copy.deepcopy(visual).requires_grad_(False), steps)
    run.mkdir(parents=True, exist_ok=True)
    torch.save(visual.state_dict(), run / "tower.pt")


def draw_scenes(index: int, split: Split, seed: int) -> tuple[Tensor, Batch]:
    """One batch of scenes: of four one at full size, two smaller, one of other sides, now and then large."""
    turn, kind = divmod(index, 4)
    if kind == 3:
        height, width = (*LARGE, *qwen_cache.OTHER_SIZES)[turn % (len(LARGE) + len(qwen_cache.OTHER_SIZES))]
        return qwen_cache.draw_sized(index, split, seed, height, width)
    frames, batch = qwen_cache.draw_sized(index, split, seed, 224, 224)
    if kind == 0:
        return frames, batch
    return scaled(frames, batch, SIDES[(2 * turn + kind) % len(SIDES)])


def draw_clips(index: int, split: Split, seed: int) -> tuple[Tensor, Batch]:
    """One batch of clips, every second one smaller."""
    frames, batch = qwen_cache.draw_clips(index, split, seed)
    return (frames, batch) if index % 2 == 0 else scaled(frames, batch, CLIP_SIDES[index // 2 % len(CLIP_SIDES)])


def build(run: Path, split: Split, scenes: int, clips: int, seed: int = 0) -> None:
    """Cache the tokens of scenes and clips of several scales by ``RUN/tower.pt`` in ``RUN/SPLIT.pt``."""
    qwen_cache.write(run, split, seed, ((draw_scenes, scenes), (draw_clips, clips)))


def blend(run: Path, share: float = 0.8) -> None:
    """Store the mean of a run's weights, by ``share``, and of those shipped until now.

    Weights between a model and its continuation keep what the first could, and have most of what was learned: full size
    and clips had suffered from the smaller pictures.
    """
    file = PACKAGE / "qwen2_5_vl" / "model.safetensors"
    before = load_file(file)
    export("qwen2_5_vl", run)
    after = load_file(file)
    mixed = {key: share * after[key].float() + (1 - share) * weight.float() for key, weight in before.items()}
    save_file({key: weight.half().contiguous() for key, weight in mixed.items()}, file, metadata={"format": "pt"})
