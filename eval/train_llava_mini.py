"""Train LLaVA-Mini's compressor on the reference LLaVA, and compare it at equal numbers of tokens.

    python -m eval.train_llava_mini --cache cache/ --side 2 --fusion 2 --steps 300 --out modules/
    python -m eval.train_llava_mini --cache cache/ --compare modules-1/ modules-2/ modules-4/ --table table.json

Tower features come from `python -m eval.reference.train cache`, so that the tower does not run; the decoder is frozen
and reads several questions packed behind each picture. `vtc.train` does the same without a cache, on anybody's
pictures.

An answer counts as right if every one of its tokens, its end included, is the most probable one behind those before it,
which is when greedy decoding gives exactly it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import vtc
import vtc.reference
from eval.reference.train.__main__ import PRACTICE, Data
from eval.reference.train.packing import IGNORE, PackedText, Packer, attention_mask
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.vocabulary import GRID
from vtc.selectors.learned import Decoder, save_modules
from vtc.selectors.learned.llava_mini import Compressor, begin

FIRST = 1
"""Position of the first visual token."""

LENGTH = 120
"""Tokens of the questions and answers packed behind one picture."""

Tokens = Callable[[Tensor], tuple[Any, ...]]
"""From cached views (B, views, N, D), of which LLaVA reads the last, to tokens (B, K, d) and their places (B, K).

What reads more than these may give an `Update`, too.
"""

Update = Callable[[int, Tensor], Tensor]
"""From a decoder layer and the hidden states that enter it to those that it is to get."""

Fuse = Callable[[Tensor, Tensor, Tensor, PackedText], tuple[Tensor, Tensor]]
"""From features (B, N, D), tokens (B, K, d), embeddings (B, 1 + T, d) of the prompt's text and the text to the new
tokens and embeddings."""


class Reader:
    """The frozen reference LLaVA behind its tower."""

    def __init__(self) -> None:
        self.model, processor = vtc.reference.load("llava")
        self.model.requires_grad_(False)
        self.decoder = self.model.model.language_model
        self.packer = Packer(processor.tokenizer, FIRST + GRID**2, LENGTH)

    def project(self, features: Tensor) -> Tensor:
        """Give what the language model gets without compression, (B, N, d)."""
        projected: Tensor = self.model.model.multi_modal_projector(features)
        return projected

    def answer(self, views: Tensor, tokens: Tokens, text: PackedText, fuse: Fuse | None = None) -> Tensor:
        """Compute logits (M, V) at the positions of ``text.labels`` behind the tokens of views (B, views, N, D)."""
        visual, places, *update = tokens(views)
        embed = self.model.get_input_embeddings()
        bos = torch.full((len(views), 1), self.decoder.config.bos_token_id)
        words: Tensor = embed(torch.cat([bos, text.ids], dim=1))
        if fuse is not None:
            visual, words = fuse(views[:, -1].float(), visual, words, text)
        hidden = torch.cat([words[:, :1], visual, words[:, 1:]], dim=1)
        return self(hidden, places, text, *update)

    def __call__(self, hidden: Tensor, places: Tensor, text: PackedText, update: Update | None = None) -> Tensor:
        """Compute logits (M, V) behind embeddings (B, 1 + K + T, d) whose K visual tokens are at places (B, K).

        `update` changes the hidden states that enter a layer.
        """
        prefix = FIRST + places.shape[1]
        positions = torch.cat([torch.zeros_like(places[:, :1]), FIRST + places, text.positions], dim=1)
        seen = attention_mask(prefix, text.segments)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        rotary = self.decoder.rotary_emb(hidden, positions)
        for index, layer in enumerate(self.decoder.layers):
            if update is not None:
                hidden = update(index, hidden)
            hidden = layer(hidden, attention_mask=mask.to(hidden.dtype), position_embeddings=rotary)
        logits: Tensor = self.model.lm_head(self.decoder.norm(hidden)[:, prefix:][text.labels != IGNORE])
        return logits


def replaced(reader: Reader, module: Compressor) -> Tokens:
    """Give the tokens of a compressor."""
    line = (2 * torch.arange(module.side) + 1) * GRID // (2 * module.side)
    places = (line[:, None] * GRID + line).flatten()  # where the method puts them

    def tokens(views: Tensor) -> tuple[Tensor, Tensor]:
        features = views[:, -1].float()
        read = reader.project(features) if module.source == "projected" else features
        return module(read, (GRID, GRID)), places.expand(len(views), -1)

    return tokens


def fused(reader: Reader, module: Compressor) -> Fuse | None:
    """Give the fusion of a compressor, for questions that are packed; answers are not fused."""
    fusion = module.fusion
    if fusion is None:
        return None

    def fuse(features: Tensor, tokens: Tensor, words: Tensor, text: PackedText) -> tuple[Tensor, Tensor]:
        prefix = features.shape[1] + tokens.shape[1] + FIRST  # the fusion reads the first token behind the visual ones
        places = torch.cat([torch.zeros_like(text.positions[:, :1]), text.positions - FIRST - GRID**2 + 1], dim=1)
        seen = attention_mask(prefix, text.segments)
        tokens, new = fusion(reader.project(features), tokens, words, places + prefix - FIRST, seen)
        labelled = functional.pad(text.labels != IGNORE, (1, 0))
        # The last token of a question predicts the first of the answer; what follows is answer.
        answer = labelled & functional.pad(labelled[:, :-1], (1, 0))
        return tokens, torch.where(answer[..., None], words, new.to(words.dtype))

    return fuse


def selected(reader: Reader, method: str, count: int, seed: int = 0) -> Tokens:
    """Give the tokens that a method which needs projected features alone keeps."""

    def tokens(views: Tensor) -> tuple[Tensor, Tensor]:
        kept, places = [], []
        for index, row in enumerate(reader.project(views[:, -1].float())):
            choice = vtc.select(method, features=row, grid_thw=(1, GRID, GRID), keep_tokens=count, seed=seed + index)
            kept.append(choice.tokens(row))
            places.append(choice.keep)
        return torch.stack(kept), torch.stack(places)

    return tokens


def train(reader: Reader, module: Compressor, data: Data, arguments: argparse.Namespace) -> float:
    """Train a compressor; return the seconds of this process that it took.

    Layers that begin as the decoder's learn at a fifth of the rate.
    """
    steps, batch, rate, seed = (getattr(arguments, name) for name in ("steps", "batch", "rate", "seed"))
    copied = [] if module.fusion is None else list(module.fusion.layers.parameters())
    new = [weight for weight in module.parameters() if all(weight is not other for other in copied)]
    groups = [{"params": new, "lr": rate}, *([{"params": copied, "lr": rate / 5}] if copied else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    chance, began, losses = np.random.default_rng(seed), time.process_time(), []
    tokens, fuse = replaced(reader, module), fused(reader, module)
    for step in range(steps):
        indices = chance.integers(len(data.scenes), size=batch)
        text = questions(reader.packer, data, indices, seed=1 + step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader.answer(data.batch(indices), tokens, text, fuse)
        loss = functional.cross_entropy(logits.float(), text.labels[text.labels != IGNORE])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"step {step + 1}, {time.process_time() - began:.0f} s: loss {np.mean(losses[-20:]):.3f}", flush=True)
    return time.process_time() - began


def narrower(decoder: Decoder, hidden: int) -> Decoder:
    """Give a decoder whose MLPs have only the `hidden` units with the largest weights, so that modules are small."""
    layers = []
    for weights in decoder.layers:
        size = weights["mlp.down_proj.weight"].norm(dim=0) * weights["mlp.up_proj.weight"].norm(dim=1)
        units = size.topk(hidden).indices.sort().values
        cut = {f"mlp.{name}_proj.weight": weights[f"mlp.{name}_proj.weight"][units] for name in ("gate", "up")}
        layers.append({**weights, **cut, "mlp.down_proj.weight": weights["mlp.down_proj.weight"][:, units]})
    return Decoder({**decoder.shape, "hidden": hidden}, layers)


def questions(packer: Packer, data: Data, indices: Sequence[int], seed: int, **given: Any) -> PackedText:
    """Return packed questions about each of these scenes; each seed asks others."""
    return packer.pack(
        [ask(data.scenes[int(index)], 12, seed=seed, **(given or {"kinds": PRACTICE})) for index in indices]
    )


@torch.no_grad()
def right(reader: Reader, tokens: Tokens, data: Data, fuse: Fuse | None = None, per_scene: int = 8) -> list[np.ndarray]:
    """Say of every scene which of its questions are answered exactly."""
    found = []
    for first in range(0, len(data.scenes), 8):
        indices = np.arange(first, min(first + 8, len(data.scenes)))
        asked = [ask(data.scenes[int(index)], per_scene, seed=0) for index in indices]
        text = reader.packer.pack(asked)
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


def interval(scenes: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float, float]:
    """Mean over all questions, and its 95 % interval by drawing scenes (1,000 times)."""
    sums, counts = np.array([s.sum() for s in scenes]), np.array([len(s) for s in scenes])
    draws = np.random.default_rng(seed).integers(len(scenes), size=(1000, len(scenes)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def compare(reader: Reader, data: Data, folders: Sequence[str]) -> dict[str, Any]:
    """Measure the compressors of these folders beside methods without modules, at their numbers of tokens."""
    rows: list[dict[str, Any]] = []

    def add(method: str, count: int, tokens: Tokens, fuse: Fuse | None = None, **more: Any) -> None:
        scenes = right(reader, tokens, data, fuse)
        mean, low, high = interval(scenes)
        asked = sum(map(len, scenes))
        rows.append({"method": method, "tokens": count, "accuracy": mean, "low": low, "high": high, **more})
        print(f"{method} {count}: {mean:.3f} ({low:.3f} to {high:.3f}) of {asked}", flush=True)

    every = torch.arange(GRID**2)
    add("all tokens", GRID**2, lambda x: (reader.project(x[:, -1].float()), every.expand(len(x), -1)))
    for folder in folders:
        selector = vtc.registry.get_selector("llava-mini", modules=folder)
        made_for, module = selector.made_for, selector.module
        count, parameters = module.side**2, sum(weight.numel() for weight in module.parameters())
        if all(row["tokens"] != count for row in rows):
            for method in ("random", "uniform", "pool", "vtc"):
                add(method, count, selected(reader, method, count))
        fusion, told = module.fusion, dict(made_for.training)
        told["fusion layers"] = 0 if fusion is None else len(fusion.layers)
        add("llava-mini", count, replaced(reader, module), fused(reader, module), parameters=parameters, training=told)
    return {"scenes": len(data.scenes), "split": "test", "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of cached scenes, train and test")
    parser.add_argument("--out", type=Path, help="folder for the modules")
    parser.add_argument("--side", type=int, default=2, help="C: C x C tokens")
    parser.add_argument("--fusion", type=int, default=0, help="layers that fuse tokens and text (0)")
    parser.add_argument("--hidden", type=int, help="width inside the MLP of these layers (the decoder's)")
    parser.add_argument("--projected", action="store_true", help="let the queries read projected features")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", nargs="+", help="folders of modules")
    parser.add_argument("--table", type=Path, help="file for the comparison")
    arguments = parser.parse_args(argv)
    reader = Reader()
    if arguments.compare:
        found = compare(reader, Data.load("test", arguments.cache), arguments.compare)
        if arguments.table:
            arguments.table.write_text(json.dumps(found, indent=1) + "\n")
        return
    config = reader.model.config
    shape = vtc.ModelShape(
        config.text_config.num_hidden_layers,
        family=config.model_type,
        width=config.text_config.hidden_size,
        vision_width=config.vision_config.hidden_size,
    )
    projector = reader.model.model.multi_modal_projector.state_dict()
    decoder = Decoder.of(config.text_config, reader.decoder.layers)
    if arguments.hidden:
        decoder = narrower(decoder, arguments.hidden)
    sizes = {"side": arguments.side, "fusion": arguments.fusion, "seed": arguments.seed}
    modules, module = begin(shape, None if arguments.projected else projector, decoder, **sizes)
    data = Data.load("train", arguments.cache)
    seconds = train(reader, module, data, arguments)
    names = ("steps", "batch", "rate", "seed")
    told = {name: getattr(arguments, name) for name in names} | {"samples": len(data.scenes), "seconds": round(seconds)}
    save_modules(arguments.out, replace(modules, training=told), module, torch.float16)  # what ships is to be small


if __name__ == "__main__":
    main()
