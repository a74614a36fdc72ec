"""Read many questions packed behind one cached picture or clip: what trains and compares modules without the tower.

An answer counts as right if every one of its tokens, its end included, is the most probable one behind those before it,
which is when greedy decoding gives exactly it.
"""

from __future__ import annotations

import json
import math
import pickle
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import vtc
import vtc.reference
from eval.reference.train.__main__ import PRACTICE
from eval.reference.train.cache import FRAMES_PER_PATCH, NO_PIXELS, PATCH, Data, normalised
from eval.reference.train.models import PackedQwen
from eval.reference.train.packing import IGNORE, PackedText, Packer, attention_mask
from eval.reference.train.qwen_cache import PRACTICED
from eval.reference.train.qwen_tower import patchify
from eval.tasks.clips import questions as clip_questions
from eval.tasks.clips.clip import LENGTHS, SIDE, Actor, Clip, make_clip
from eval.tasks.clips.files import read_mp4, write_mp4
from eval.tasks.scenes import questions as scene_questions
from eval.tasks.scenes.questions import Question
from eval.tasks.scenes.scene import make_scene
from eval.tasks.scenes.sources import Split
from eval.tasks.scenes.vocabulary import GRID

__all__ = [
    "READERS",
    "ClipReader",
    "Fuse",
    "PackedReader",
    "Reader",
    "Tokens",
    "Update",
    "everything",
    "interval",
    "right",
    "selected",
]

LENGTH = 120
"""Tokens of the questions and answers packed behind one picture."""

BATCH = 16
"""Pictures or clips that the tower encodes at once."""

Tokens = Callable[[Tensor], tuple[Any, ...]]
"""From cached views to tokens (B, K, d) and their places (B, K); what reads more than these gives an `Update`, too."""

Update = Callable[[int, Tensor], Tensor]
"""From a decoder layer and the hidden states that enter it to those that it is to get."""

Fuse = Callable[[Tensor, Tensor, Tensor, PackedText], tuple[Tensor, Tensor]]
"""From projected features (B, N, d), tokens (B, K, d), embeddings (B, F + T, d) of the prompt's text, of which the
first F surround the visual tokens, and the packed text to the new tokens and embeddings."""


class PackedReader(ABC):
    """A frozen reference model behind its tower: ``before, visual tokens, after, questions``.

    Attributes
    ----------
    grid
        Frames, rows and columns of the visual tokens.
    before, after
        Words of the chat template around the visual tokens.
    feature_layer
        Layer of the tower (0-based) that feeds the projector.
    """

    name: ClassVar[str]
    grid: ClassVar[tuple[int, int, int]]
    before: ClassVar[tuple[str, ...]]
    after: ClassVar[tuple[str, ...]]
    text_start: ClassVar[int]
    feature_layer: ClassVar[int]

    def __init__(self) -> None:
        self.model, processor = vtc.reference.load(self.name)
        self.model.requires_grad_(False)
        self.decoder = self.model.model.language_model
        words = processor.tokenizer
        self.around = torch.tensor(words.convert_tokens_to_ids([*self.before, *self.after]))
        self.packer = Packer(words, self.text_start, LENGTH)

    @property
    def count(self) -> int:
        """N, visual tokens without compression."""
        return math.prod(self.grid)

    def shape(self) -> vtc.ModelShape:
        """Return what modules are made for."""
        text, vision = self.model.config.text_config, self.model.config.vision_config
        return vtc.ModelShape(
            text.num_hidden_layers,
            family=self.model.config.model_type,
            width=text.hidden_size,
            vision_width=vision.hidden_size,
            feature_layer=self.feature_layer,
        )

    @abstractmethod
    def project(self, views: Tensor) -> Tensor:
        """Give what the language model gets without compression, (B, N, d), for cached views."""

    @abstractmethod
    def levels(self, views: Tensor) -> Tensor:
        """Give outputs of layers of the tower, (B, N, levels, D)."""

    @abstractmethod
    def cache(self, split: Split, seed: int, count: int, folder: Path, levels: Sequence[int]) -> None:
        """Cache what these layers of the tower give for so many sources."""

    @abstractmethod
    def load(self, split: Split, cache: Path) -> Data:
        """Read every folder ``<split>*`` of a cache."""

    @abstractmethod
    def ask(self, source: Any, count: int, seed: int, practice: bool = False) -> tuple[Question, ...]:
        """Ask about a scene or clip; in practice more of what takes long to learn."""

    @abstractmethod
    def positions(self, places: Tensor, text: PackedText) -> Tensor:
        """Give position ids (..., B, P + T) for visual tokens at places (B, K)."""

    def questions(self, data: Data, indices: Sequence[int], seed: int) -> PackedText:
        """Return packed questions for training about each of these sources; each seed asks others."""
        return self.packer.pack([self.ask(data.scenes[int(index)], 12, seed, practice=True) for index in indices])

    def answer(self, views: Tensor, tokens: Tokens, text: PackedText, fuse: Fuse | None = None) -> Tensor:
        """Compute logits (M, V) at the positions of ``text.labels`` behind the tokens of views."""
        visual, places, *update = tokens(views)
        ids = torch.cat([self.around.expand(len(views), -1), text.ids], dim=1)
        words: Tensor = self.model.get_input_embeddings()(ids)
        if fuse is not None:
            visual, words = fuse(self.project(views), visual, words, text)
        first = len(self.before)
        hidden = torch.cat([words[:, :first], visual, words[:, first:]], dim=1)
        return self(hidden, places, text, *update)

    def __call__(self, hidden: Tensor, places: Tensor, text: PackedText, update: Update | None = None) -> Tensor:
        """Compute logits (M, V) behind embeddings of a prompt whose K visual tokens are at places (B, K).

        `update` changes the hidden states that enter a layer.
        """
        prefix = len(self.around) + places.shape[1]
        seen = attention_mask(prefix, text.segments)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        rotary = self.decoder.rotary_emb(hidden, self.positions(places, text))
        for index, layer in enumerate(self.decoder.layers):
            if update is not None:
                hidden = update(index, hidden)
            hidden = layer(hidden, attention_mask=mask.to(hidden.dtype), position_embeddings=rotary)
        logits: Tensor = self.model.lm_head(self.decoder.norm(hidden)[:, prefix:][text.labels != IGNORE])
        return logits


class Reader(PackedReader):
    """The reference LLaVA on scenes; cached views are (B, levels, N, D), of which LLaVA reads the last."""

    name = "llava"
    grid = (1, GRID, GRID)
    before, after = ("<s>",), ()
    text_start = 1 + GRID**2
    feature_layer = 10

    def project(self, views: Tensor) -> Tensor:
        projected: Tensor = self.model.model.multi_modal_projector(views[:, -1].float())
        return projected

    def levels(self, views: Tensor) -> Tensor:
        return views.transpose(1, 2)

    @torch.no_grad()
    def cache(self, split: Split, seed: int, count: int, folder: Path, levels: Sequence[int]) -> None:
        def encode(scenes: list[Any]) -> Tensor:
            pixels = normalised(np.stack([scene.image for scene in scenes]))
            hidden = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            return torch.stack([hidden[n + 1][:, 1:] for n in levels], dim=1)

        _write(
            folder, split, seed, count, lambda index: make_scene(split, seed, index), encode, lambda scene: scene.things
        )

    def load(self, split: Split, cache: Path) -> Data:
        return Data.load(split, cache)

    def ask(self, source: Any, count: int, seed: int, practice: bool = False) -> tuple[Question, ...]:
        return scene_questions.ask(source, count, seed=seed, **({"kinds": PRACTICE} if practice else {}))

    def positions(self, places: Tensor, text: PackedText) -> Tensor:
        return torch.cat([torch.zeros_like(places[:, :1]), 1 + places, text.positions], dim=1)


class ClipReader(PackedReader):
    """The reference Qwen2.5-VL on clips of eight frames: 256 tokens.

    Cached views are (B, 1, N, levels * D + d): layers of the tower side by side, and what it gives the language model.
    """

    name = "qwen2_5_vl"
    grid = (LENGTHS[0] // FRAMES_PER_PATCH, SIDE // PATCH, SIDE // PATCH)
    before, after = ("<s>", "<|vision_start|>"), ("<|vision_end|>",)
    text_start = PackedQwen.text_start(grid)
    feature_layer = 5

    def project(self, views: Tensor) -> Tensor:
        return views[:, -1, :, -self.decoder.config.hidden_size :].float()

    def levels(self, views: Tensor) -> Tensor:
        width = self.model.config.vision_config.hidden_size
        return views[:, -1, :, : -self.decoder.config.hidden_size].unflatten(-1, (-1, width))

    @torch.no_grad()
    def cache(self, split: Split, seed: int, count: int, folder: Path, levels: Sequence[int]) -> None:
        tower, found = self.model.model.visual, {}
        for level in levels:
            tower.blocks[level].register_forward_hook(lambda _, given, out, level=level: found.update({level: out}))

        def encode(clips: list[Clip]) -> Tensor:
            frames = torch.from_numpy(np.stack([compressed(clip) for clip in clips]))
            grid = torch.tensor([self.grid] * len(clips))
            tokens = tower(patchify(frames).flatten(0, 1), grid_thw=grid).pooler_output
            # A window is a frame of 8 x 8 patches, so that the tower has them in the order of the tokens.
            side_by_side = torch.cat([*(found[level] for level in levels), tokens], dim=-1)
            return side_by_side.view(len(clips), 1, self.count, -1)

        _write(folder, split, seed, count, lambda index: clip_of(split, seed, index), encode, lambda clip: clip.actors)

    def load(self, split: Split, cache: Path) -> Data:
        def known(actors: tuple[Actor, ...], split: Split, seed: int, index: int) -> Any:
            return Clip(NO_PIXELS, actors, LENGTHS[0], split, seed, index)

        return Data.load(split, cache, known)

    def ask(self, source: Any, count: int, seed: int, practice: bool = False) -> tuple[Question, ...]:
        more = [kind for kind in clip_questions.KINDS if kind in PRACTICED] * 2 * practice
        return clip_questions.ask(source, count, kinds=(*clip_questions.KINDS, *more), seed=seed)

    def positions(self, places: Tensor, text: PackedText) -> Tensor:
        before, after = torch.tensor([0, 1]), torch.tensor([self.text_start - 1])
        visual = PackedQwen.token_positions(self.grid)[:, places] + len(self.before)
        parts = [before.expand(3, len(places), -1), visual, after.expand(3, len(places), -1)]
        return torch.cat([*parts, text.positions.expand(3, -1, -1)], dim=-1)


READERS = {"scenes": Reader, "clips": ClipReader}


def clip_of(split: Split, seed: int, index: int) -> Clip:
    """Draw a clip of eight frames."""
    return make_clip(split, seed, index, LENGTHS[:1])


def compressed(clip: Clip) -> NDArray[np.uint8]:
    """Return the frames of a clip as a model gets them: after H.264."""
    with tempfile.TemporaryDirectory() as folder:
        write_mp4(Path(folder) / "clip.mp4", clip.frames)
        return read_mp4(Path(folder) / "clip.mp4")


def _write(
    folder: Path,
    split: Split,
    seed: int,
    count: int,
    draw: Callable[[int], Any],
    encode: Callable[[list[Any]], Tensor],
    things: Callable[[Any], Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    features, held = None, []
    for first in range(0, count, BATCH):
        sources = [draw(index) for index in range(first, min(first + BATCH, count))]
        with torch.autocast("cpu", torch.bfloat16):
            views = encode(sources).half().numpy()
        if features is None:
            shape = (count, *views.shape[1:])
            features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, shape)
        features[first : first + len(sources)] = views
        held += [things(source) for source in sources]
    (folder / "things.pkl").write_bytes(pickle.dumps(held))
    (folder / "state.json").write_text(json.dumps({"split": split, "seed": seed, "count": count}))


def selected(reader: PackedReader, method: str, count: int, seed: int = 0) -> Tokens:
    """Give the tokens that a method which needs projected features alone keeps."""

    def tokens(views: Tensor) -> tuple[Tensor, Tensor]:
        kept, places = [], []
        for index, row in enumerate(reader.project(views)):
            choice = vtc.select(method, features=row, grid_thw=reader.grid, keep_tokens=count, seed=seed + index)
            kept.append(choice.tokens(row))
            places.append(choice.keep)
        return torch.stack(kept), torch.stack(places)

    return tokens


def everything(reader: PackedReader) -> Tokens:
    """Give all tokens."""
    every = torch.arange(reader.count)
    return lambda views: (reader.project(views), every.expand(len(views), -1))


@torch.no_grad()
def right(
    reader: PackedReader, tokens: Tokens, data: Data, fuse: Fuse | None = None, per_source: int = 8
) -> list[np.ndarray]:
    """Say of every scene or clip which of its questions are answered exactly."""
    found = []
    for first in range(0, len(data.scenes), 8):
        indices = np.arange(first, min(first + 8, len(data.scenes)))
        text = reader.packer.pack([reader.ask(data.scenes[int(index)], per_source, 0) for index in indices])
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader.answer(data.batch(indices), tokens, text, fuse)
        where = text.labels != IGNORE
        good = torch.zeros_like(text.labels)
        good[where] = (logits.argmax(dim=-1) == text.labels[where]).long()
        for row in range(len(indices)):
            segments = text.segments[row]
            numbers = range(1, int(segments.max()) + 1)
            found.append(
                np.array([bool(good[row][where[row] & (segments == number)].all()) for number in numbers], dtype=float)
            )
    return found


def interval(sources: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float, float]:
    """Mean over all questions, and its 95 % interval by drawing scenes or clips (1,000 times)."""
    sums, counts = np.array([s.sum() for s in sources]), np.array([len(s) for s in sources])
    draws = np.random.default_rng(seed).integers(len(sources), size=(1000, len(sources)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / counts.sum()), float(low), float(high)
