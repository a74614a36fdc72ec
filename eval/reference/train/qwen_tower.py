"""Train the vision tower of ``qwen2_5_vl`` to produce what the tower and projector of ``llava`` produce.

It starts as the first layers of the other tower, converted in closed form (``qwen_convert``). On pictures at rest every
token is pulled towards the visual token that the shipped ``llava`` makes of the same patch, so that its decoder can be
taken over. Motion, which that model cannot know, is learned from labels: tokens are pulled towards the word vectors of
the colour, shape and motion of their patch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

import vtc_reference
from eval.reference.train.cache import FRAMES_PER_PATCH, PATCH, TOKENIZER, normalised, tower_features
from eval.reference.train.labels import ATTRIBUTES, COLUMN, word_ids
from eval.reference.train.models import HIDDEN
from eval.reference.train.qwen_convert import convert
from eval.reference.train.qwen_crops import make_crop

BATCHES: Final = ((112, True, 24), (224, False, 8), (224, False, 8), (224, False, 8))
"""Batches in turn: side in pixels, moving or not, crops. Motion is learned sooner than reading."""

SEED: Final = 0
RATE: Final = 8e-4
_OWNED_WEIGHT: Final = 8.0  # a labelled patch counts this many times as much as a patch of background
_PRETRAINED_SHARE: Final = 0.25  # of the learning rate, for weights that come from the pretrained tower
_DISTILLATION_WEIGHT: Final = 4.0


def patchify(frames: Tensor) -> Tensor:
    """Normalise ``frames (B, T, H, W, 3)`` uint8 and cut them in patches ``(B, T / 2 * H / 14 * W / 14, 1176)``.

    ``T`` is even, sides are multiples of 14; the order is that of ``Qwen2VLImageProcessor``.
    """
    batch, time, height, width, _ = frames.shape
    x = normalised(frames.flatten(0, 1).numpy())
    x = x.view(batch, time // FRAMES_PER_PATCH, FRAMES_PER_PATCH, 3, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(batch, -1, 3 * FRAMES_PER_PATCH * PATCH * PATCH)


def tower_tokens(visual: Any, frames: Tensor) -> Tensor:
    """Run the tower: tokens ``(B, N, width)`` of ``frames (B, T, H, W, 3)`` uint8."""
    batch, time, height, width, _ = frames.shape
    grid = torch.tensor([[time // FRAMES_PER_PATCH, height // PATCH, width // PATCH]] * batch)
    tokens: Tensor = visual(patchify(frames).flatten(0, 1), grid_thw=grid).pooler_output
    return tokens.view(batch, -1, tokens.shape[-1])


class Teacher:
    """The visual tokens of the shipped ``llava``, less what they say on average about the place they are at.

    The student cannot know places; in its model the decoder's positions carry them.
    """

    def __init__(self) -> None:
        self.llava, _ = vtc_reference.load("llava")
        self.llava.requires_grad_(False)
        self.places = torch.zeros(256, HIDDEN)
        self.variance = 1.0

    @torch.no_grad()
    def tokens(self, frames: Tensor) -> Tensor:
        """Tokens ``(B, 256, HIDDEN)`` of the first of ``frames (B, T, 224, 224, 3)``."""
        model = self.llava.model
        features = tower_features(model.vision_tower, normalised(frames[:, 0].numpy()))[0]
        tokens: Tensor = model.multi_modal_projector(features.float()) - self.places
        return tokens

    def prepare(self, tokens: Tensor) -> None:
        """Find what is to be subtracted, from the tokens ``(n, 256, HIDDEN)`` of many pictures."""
        mean = tokens.mean(0)
        self.places = mean - mean.mean(0)
        self.variance = float((tokens - mean).square().mean())

    def loss(self, tokens: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        """Squared distance of ``tokens (B, 256, HIDDEN)`` from what is ``wanted``, as a share of its variance."""
        weight = torch.where(labels[:, 0] > 0, _OWNED_WEIGHT, 1.0)
        error = (tokens.float() - wanted).square().mean(-1)
        return (error * weight).sum() / weight.sum() / self.variance

    def reading(self, tokens: Tensor, labels: Tensor, words: Tensor) -> tuple[Tensor, float]:
        """Loss and accuracy of what the teacher's decoder reads, half-way up, from the student's tokens.

        Its first layers have learned to read words and digits from tokens of strokes; here they teach the student which
        strokes to distinguish. ``words (classes, HIDDEN)`` are the vectors of what can be written.
        """
        wanted = labels[:, COLUMN["text"]]
        written = wanted > 0
        if not bool(written.any()):
            return tokens.new_zeros(()), float("nan")
        decoder = self.llava.model.language_model
        start = decoder.embed_tokens.weight[self.llava.config.text_config.bos_token_id].expand(len(tokens), 1, -1)
        hidden = torch.cat([start, tokens.float() + self.places], 1)
        rotary = decoder.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])
        for layer in decoder.layers[: len(decoder.layers) // 2]:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        logits = (functional.layer_norm(hidden[:, 1:].float(), (HIDDEN,))[written] @ words.t()).float()
        accuracy = float((logits.argmax(-1) == wanted[written]).float().mean())
        return functional.cross_entropy(logits, wanted[written]), accuracy


class Vocabulary(nn.Module):
    """Word vectors of everything that a patch can show: the teacher's own, and new ones for motion."""

    def __init__(self, llava: Any, scale: float = 1.2) -> None:
        super().__init__()
        embeddings = llava.model.language_model.embed_tokens.weight.detach()
        words = dict(zip(ATTRIBUTES, word_ids(AutoTokenizer.from_pretrained(TOKENIZER)), strict=True))
        frozen = {name: nn.Parameter(scale * embeddings[ids], requires_grad=False) for name, ids in words.items()}
        motion = nn.Parameter(0.05 * torch.randn(len(words["motion"]), HIDDEN))
        self.tables = nn.ParameterDict(frozen | {"motion": motion})

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of ``tokens (B, N, HIDDEN)`` against the words of ``labels (B, attributes, N)``.

        Writing is left out: a patch holds a stroke of a digit or one letter, see :meth:`Teacher.reading`.
        """
        normed = functional.layer_norm(tokens.float(), (HIDDEN,)).flatten(0, 1)
        weight = torch.where((labels[:, 0] > 0).flatten(), _OWNED_WEIGHT, 1.0)
        total = normed.new_zeros(())
        for name in ("colour", "shape", "motion"):
            logits, wanted = normed @ self.tables[name].t(), labels[:, COLUMN[name]].flatten()
            each = functional.cross_entropy(logits, wanted, reduction="none")
            total = total + (each * weight).sum() / weight.sum()
        return total


def batch_loss(
    teacher: Teacher, vocabulary: Vocabulary, tokens: Tensor, labels: Tensor, wanted: Tensor | None
) -> Tensor:
    """The loss of one batch; ``wanted`` are the teacher's tokens of pictures at rest."""
    loss = vocabulary.loss(tokens, labels)
    if wanted is not None:
        reading, _ = teacher.reading(tokens, labels, vocabulary.tables["text"])
        loss = loss + _DISTILLATION_WEIGHT * teacher.loss(tokens, wanted, labels) + reading
    return loss


def make_batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Frames ``(B, 2, side, side, 3)`` uint8 and labels ``(B, attributes, patches)`` of one step."""
    side, moving, count = BATCHES[step % len(BATCHES)]
    rng = np.random.default_rng([seed, step, False])
    crops = [make_crop(side, moving, rng) for _ in range(count)]
    frames = torch.from_numpy(np.stack([frames for frames, _ in crops]))
    return frames, torch.from_numpy(np.stack([labels for _, labels in crops])).flatten(2)


def align(visual: Any, vocabulary: Vocabulary, teacher: Teacher, steps: int = 400, batches: int = 60) -> None:
    """Train merger and vocabulary alone on cached features: cheap, and the tower's gradients then make sense."""
    kept: list[tuple[Tensor, Tensor, Tensor | None]] = []
    mlp, visual.merger.mlp = visual.merger.mlp, nn.Identity()
    for step in range(batches):
        frames, labels = make_batch(SEED + 1, step)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = tower_tokens(visual, frames)
        kept.append((features, labels, teacher.tokens(frames) if frames.shape[2] == 224 else None))
    visual.merger.mlp = mlp
    teacher.prepare(torch.cat([wanted for *_, wanted in kept if wanted is not None]))
    kept = [(f, labels, None if wanted is None else wanted - teacher.places) for f, labels, wanted in kept]
    trained = [*mlp.parameters(), *vocabulary.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    for step in range(steps):
        features, labels, wanted = kept[step % batches]
        with torch.autocast("cpu", torch.bfloat16):
            loss = batch_loss(teacher, vocabulary, mlp(features), labels, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return RATE * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(visual: Any, vocabulary: Vocabulary, teacher: Teacher, steps: int) -> list[float]:
    """Train the tower in place; returns the losses."""
    pretrained = [parameter for name, parameter in visual.named_parameters() if not name.startswith("merger.")]
    new = [*visual.merger.parameters(), *vocabulary.parameters()]
    groups = [{"params": pretrained, "share": _PRETRAINED_SHARE}, {"params": new, "share": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), weight_decay=0.02)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * learning_rate(step, steps)
        frames, labels = make_batch(SEED, step)
        wanted = teacher.tokens(frames) if frames.shape[2] == 224 else None
        with torch.autocast("cpu", torch.bfloat16):
            loss = batch_loss(teacher, vocabulary, tower_tokens(visual, frames), labels, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*pretrained, *new], 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-25:]):.3f}", flush=True)
    return losses


def train(run: Path, steps: int = 920) -> None:
    """Convert, align and train the tower of qwen2_5_vl; writes ``RUN/tower.pt``."""
    torch.manual_seed(SEED)
    teacher = Teacher()
    crops = np.stack([make_crop(224, False, np.random.default_rng([SEED, 1, i]))[0][0] for i in range(48)])
    visual, vocabulary = convert(teacher.llava.model.vision_tower, normalised(crops)), Vocabulary(teacher.llava)
    align(visual, vocabulary, teacher)
    fit(visual, vocabulary, teacher, steps)
    run.mkdir(parents=True, exist_ok=True)
    torch.save(visual.state_dict(), run / "tower.pt")
