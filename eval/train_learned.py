"""Train `llava-mini`, `crosslmm` and `vision-remember` on the reference models, and compare them.

    python -m eval.train_learned cache --split train --seed 11 --count 2400 --folder cache/train-11
    python -m eval.train_learned cache --split test --seed 21 --count 320 --folder cache/test-21
    python -m eval.train_learned train crosslmm --cache cache/ --tokens 4 --steps 600 --rate 3e-3 --out crosslmm-4
    python -m eval.train_learned train llava-mini --cache cache/ --tokens 4 --fusion 2 --steps 240 --out llava-mini-4
    python -m eval.train_learned compare crosslmm-4 llava-mini-4 --cache cache/ --table table.json

With ``--task clips`` the model is the reference Qwen2.5-VL, on clips of eight frames. The tower's features are cached,
so that it does not run, and several questions are packed behind each picture; the decoder is frozen but for a low-rank
adapter with ``--lora``. `vtc.train` does the same without a cache, on anybody's pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import vtc
from eval.packed_reader import (
    READERS,
    Fuse,
    PackedReader,
    Reader,
    Tokens,
    Update,
    everything,
    interval,
    right,
    selected,
)
from eval.reference.train.cache import Data
from eval.reference.train.packing import IGNORE, PackedText, attention_mask
from vtc.selectors import learned
from vtc.selectors.learned import crosslmm, llava_mini, lora, vision_remember

GATES = 10
"""How much faster single numbers, which are gates, learn than matrices."""

COPIED = 0.2
"""How much slower layers learn that begin as the decoder's."""

METHODS = ("crosslmm", "llava-mini", "vision-remember")

UNTRAINED = ("random", "uniform", "pool", "vtc")


def begin(
    method: str,
    reader: PackedReader,
    tokens: int,
    *,
    seed: int = 0,
    fusion: int = 0,
    hidden: int | None = None,
    tower: bool = False,
) -> tuple[learned.Modules, Any]:
    """Make untrained modules of a method for `tokens` visual tokens.

    `fusion` and `hidden` are the layers of LLaVA-Mini's fusion and the width in their MLPs (the decoder's). Its queries
    read projected features, or with `tower` those in front of the projector of LLaVA.
    """
    if method != "llava-mini":
        return {"crosslmm": crosslmm, "vision-remember": vision_remember}[method].begin(reader.shape(), seed=seed)
    frames = reader.grid[0]
    side = math.isqrt(tokens // frames)
    if frames * side**2 != tokens:
        raise vtc.ConfigError(f"llava-mini gives C x C tokens for each of {frames} frames, which {tokens} are not.")
    decoder = learned.Decoder.of(reader.model.config.text_config, reader.decoder.layers)
    decoder = narrower(decoder, hidden) if hidden else decoder
    if tower and not isinstance(reader, Reader):
        raise vtc.ConfigError("llava-mini reads the tower of LLaVA alone; leave --tower out for clips.")
    projector = reader.model.model.multi_modal_projector.state_dict() if tower else None
    return llava_mini.begin(reader.shape(), projector, decoder, side=side, fusion=fusion, seed=seed)


def narrower(decoder: learned.Decoder, hidden: int) -> learned.Decoder:
    """Give a decoder whose MLPs have only the `hidden` units with the largest weights, so that modules are small."""
    layers = []
    for weights in decoder.layers:
        size = weights["mlp.down_proj.weight"].norm(dim=0) * weights["mlp.up_proj.weight"].norm(dim=1)
        units = size.topk(hidden).indices.sort().values
        cut = {f"mlp.{name}_proj.weight": weights[f"mlp.{name}_proj.weight"][units] for name in ("gate", "up")}
        layers.append({**weights, **cut, "mlp.down_proj.weight": weights["mlp.down_proj.weight"][:, units]})
    return learned.Decoder({**decoder.shape, "hidden": hidden}, layers)


class Updating:
    """Pooled tokens, and a method that updates hidden states behind them, on a batch at once."""

    def __init__(self, reader: PackedReader, module: Any, count: int) -> None:
        self.reader, self.module = reader, module
        n = reader.count
        choice = vtc.select("pool", features=torch.zeros(n, 1), grid_thw=reader.grid, keep_tokens=count)
        self.count, self.places, self.slots = count, choice.keep, choice.slots
        self.pooling = torch.zeros(count, n).index_put((choice.slots, torch.arange(n)), torch.tensor(1.0))
        self.pooling /= self.pooling.sum(dim=1, keepdim=True)
        axes = torch.meshgrid(*(torch.arange(size) for size in reader.grid), indexing="ij")
        self.coords = torch.stack([torch.zeros(n, dtype=torch.long), *(axis.flatten() for axis in axes)], dim=1)

    def read(self, views: Tensor) -> tuple[Tensor, Tensor, Update]:
        """Give tokens, their places and the updates for cached views."""
        projected = self.reader.project(views).float()
        places = self.places.expand(len(views), -1)
        first = len(self.reader.before)
        stop = first + self.count
        if isinstance(self.module, crosslmm.CrossAttentions):
            known = self.module.remember(projected, self.coords)

            def update(layer: int, hidden: Tensor) -> Tensor:
                if layer not in self.module.layers:
                    return hidden
                visual = self.module("visual", layer, hidden[:, first:stop], known[f"visual {layer}"])
                text = self.module("text", layer, hidden[:, stop:], known[f"text {layer}"])
                return hidden + torch.cat([torch.zeros_like(hidden[:, :first]), visual, text], dim=1)

        else:
            known = self.module.remember(
                self.reader.levels(views).flatten(0, 1).float(), self.coords.repeat(len(views), 1)
            )
            owner = (torch.arange(len(views))[:, None] * self.count + self.slots).flatten()

            def update(layer: int, hidden: Tensor) -> Tensor:
                if layer not in self.module.layers:
                    return hidden
                visual = hidden[:, first:stop]
                new = self.module(layer, visual.flatten(0, 1), known[f"layer {layer}"], owner).view(visual.shape)
                return torch.cat([hidden[:, :first], visual + new, hidden[:, stop:]], dim=1)

        return self.pooling @ projected, places, update


class Replacing:
    """New tokens for every frame, and text that is fused with the picture; answers are not fused."""

    def __init__(self, reader: PackedReader, module: llava_mini.Compressor) -> None:
        self.reader, self.module = reader, module
        frames, rows, columns = reader.grid
        side = module.side
        line = [(2 * torch.arange(side) + 1) * size // (2 * side) for size in (rows, columns)]
        square = (line[0][:, None] * columns + line[1]).flatten()  # where the method puts them
        self.places = (torch.arange(frames)[:, None] * rows * columns + square).flatten()

    def read(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Give the tokens (B, frames * C^2, d) and their places."""
        projected = self.module.source == "projected"
        source = self.reader.project(views) if projected else views[:, -1].float()
        frames, *size = self.reader.grid
        tokens = self.module(source.unflatten(1, (frames, -1)).flatten(0, 1), tuple(size))
        return tokens.unflatten(0, (-1, frames)).flatten(1, 2), self.places.expand(len(views), -1)

    def fuse(self, visual: Tensor, tokens: Tensor, words: Tensor, text: PackedText) -> tuple[Tensor, Tensor]:
        """Fuse frame by frame; the text becomes the mean over frames."""
        fusion: Any = self.module.fusion
        frames, around = self.reader.grid[0], len(self.reader.around)

        def by_frame(x: Tensor) -> Tensor:
            return x.unflatten(1, (frames, -1)).flatten(0, 1)

        visual, tokens = by_frame(visual), by_frame(tokens)
        prefix = visual.shape[1] + tokens.shape[1]  # the fusion reads the text behind the visual tokens
        places = text.positions - self.reader.text_start + around
        places = torch.cat([torch.arange(around).expand(len(places), -1), places], dim=1) + prefix
        seen = attention_mask(prefix + around, text.segments)
        each = [x.repeat_interleave(frames, dim=0) for x in (words, places, seen)]
        tokens, new = fusion(visual, tokens, *each)
        labelled = functional.pad(text.labels != IGNORE, (around, 0))
        # The last token of a question predicts the first of the answer; what follows is answer.
        answer = labelled & functional.pad(labelled[:, :-1], (1, 0))
        new = new.unflatten(0, (-1, frames)).mean(dim=1).to(words.dtype)
        return tokens.unflatten(0, (-1, frames)).flatten(1, 2), torch.where(answer[..., None], words, new)


def reading(reader: PackedReader, module: Any, tokens: int) -> tuple[Tokens, Fuse | None]:
    """Return how modules give tokens, and how they fuse the text with them, if they do."""
    if not isinstance(module, llava_mini.Compressor):
        return Updating(reader, module, tokens).read, None
    replacing = Replacing(reader, module)
    return replacing.read, None if module.fusion is None else replacing.fuse


@contextmanager
def adapted(reader: PackedReader, adapter: lora.LoraAdapter | None) -> Iterator[None]:
    """Let an adapter change the decoder of the reader while entered."""
    changes = {} if adapter is None else adapter.changes()
    layers = dict(reader.decoder.named_modules())

    def adding(change: nn.Module) -> Any:
        return lambda module, given, output: output + change(given[0]).to(output.dtype)

    handles = [layers[name].register_forward_hook(adding(change)) for name, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(
    reader: PackedReader,
    module: nn.Module,
    tokens: int,
    adapter: lora.LoraAdapter | None,
    data: Data,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
) -> float:
    """Train modules, and an adapter if there is one; return the seconds of the processor that it took."""
    weights = [*module.parameters(), *(() if adapter is None else adapter.parameters())]
    fusion = getattr(module, "fusion", None)
    copied = set() if fusion is None else set(fusion.layers.parameters())
    kinds = {
        1.0: [weight for weight in weights if weight.ndim and weight not in copied],
        GATES: [weight for weight in weights if not weight.ndim],
        COPIED: list(copied),
    }
    groups = [{"params": some, "lr": rate * factor} for factor, some in kinds.items() if some]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    chance, began, losses = np.random.default_rng(seed), time.process_time(), []
    read, fuse = reading(reader, module, tokens)
    for step in range(steps):
        indices = chance.integers(len(data.scenes), size=batch)
        text = reader.questions(data, indices, seed=1 + step)
        with torch.autocast("cpu", torch.bfloat16), adapted(reader, adapter):
            logits = reader.answer(data.batch(indices), read, text, fuse)
        loss = functional.cross_entropy(logits.float(), text.labels[text.labels != IGNORE])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 19:
            took = time.process_time() - began
            print(f"step {step + 1}, {took:.0f} s: loss {np.mean(losses[-20:]):.3f}", flush=True)
    return time.process_time() - began


def compare(
    reader: PackedReader, data: Data, folders: Sequence[Path], counts: Sequence[int], alone: bool = False
) -> dict[str, Any]:
    """Measure modules beside methods without any at these numbers of tokens, or the modules `alone`."""
    rows: list[dict[str, Any]] = []

    def add(method: str, count: int, sources: list[np.ndarray], **more: Any) -> None:
        mean, low, high = interval(sources)
        asked = sum(map(len, sources))
        row = {"method": method, "tokens": count, "accuracy": mean, "low": low, "high": high, "questions": asked}
        rows.append({**row, **more})
        print(f"{method} {count}: {mean:.3f} ({low:.3f} to {high:.3f}) of {asked}", flush=True)

    if not alone:
        add("all tokens", reader.count, right(reader, everything(reader), data))
    for count in () if alone else counts:
        for method in UNTRAINED:
            add(method, count, right(reader, selected(reader, method, count), data))
    for folder in folders:
        told = json.loads((folder / "modules.json").read_text())
        selector = vtc.registry.get_selector(told["method"], modules=str(folder))
        fixed = reader.grid[0] * selector.module.side**2 if told["method"] == "llava-mini" else None
        count = fixed or told["training"]["tokens"]
        read, fuse = reading(reader, selector.module, count)
        with adapted(reader, selector.lora):
            sources = right(reader, read, data, fuse)
        parts = [selector.module, *([] if selector.lora is None else [selector.lora])]
        sizes = [sum(weight.numel() for weight in part.parameters()) for part in parts]
        add(told["method"], count, sources, parameters=sizes, training=told["training"])
    return {"sources": len(data.scenes), "split": "test", "model": reader.name, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    caching = verbs.add_parser("cache", help="features of scenes or clips")
    caching.add_argument("--split", choices=("train", "test"), required=True)
    caching.add_argument("--count", type=int, required=True)
    caching.add_argument("--folder", type=Path, required=True)
    training = verbs.add_parser("train", help="modules of a method")
    training.add_argument("method", choices=METHODS)
    training.add_argument("--out", type=Path, required=True, help="folder for the modules")
    training.add_argument("--tokens", type=int, required=True, help="tokens per picture or clip")
    training.add_argument("--fusion", type=int, default=0, help="of llava-mini: layers that fuse tokens and text (0)")
    training.add_argument("--hidden", type=int, help="width inside the MLP of these layers (the decoder's)")
    training.add_argument("--tower", action="store_true", help="of llava-mini: read the tower, not projected features")
    training.add_argument("--steps", type=int, default=300)
    training.add_argument("--batch", type=int, default=8)
    training.add_argument("--rate", type=float, default=2e-3)
    training.add_argument("--lora", type=int, help="rank of an adapter of the decoder")
    comparing = verbs.add_parser("compare", help="with methods without modules")
    comparing.add_argument("folders", nargs="*", type=Path)
    comparing.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64], help="for methods without modules")
    comparing.add_argument("--alone", action="store_true", help="leave methods without modules out")
    comparing.add_argument("--table", type=Path, help="file for the result")
    for verb in (caching, training, comparing):
        verb.add_argument("--task", choices=READERS, default="scenes")
    for verb in (caching, training):
        verb.add_argument("--seed", type=int, default=0)
    for verb in (training, comparing):
        verb.add_argument("--cache", type=Path, required=True, help="folder with cached train* and test* folders")
    arguments = parser.parse_args(argv)
    reader: PackedReader = READERS[arguments.task]()
    if arguments.verb == "cache":
        levels = begin("vision-remember", reader, 1)[0].settings["levels"]
        reader.cache(arguments.split, arguments.seed, arguments.count, arguments.folder, levels)
        return
    if arguments.verb == "compare":
        data = reader.load("test", arguments.cache)
        found = compare(reader, data, arguments.folders, arguments.tokens, arguments.alone)
        if arguments.table:
            arguments.table.write_text(json.dumps(found, indent=1) + "\n")
        return
    sizes = {name: getattr(arguments, name) for name in ("seed", "fusion", "hidden", "tower")}
    modules, module = begin(arguments.method, reader, arguments.tokens, **sizes)
    adapter = None if arguments.lora is None else lora.begin_lora(reader.decoder, arguments.lora, arguments.seed)
    data = reader.load("train", arguments.cache)
    given = {name: getattr(arguments, name) for name in ("steps", "batch", "rate", "seed")}
    seconds = train(reader, module, arguments.tokens, adapter, data, **given)
    told = given | {"tokens": arguments.tokens, "lora": arguments.lora, "samples": len(data.scenes)}
    told["processor_seconds"] = round(seconds)
    learned.save_modules(arguments.out, replace(modules, training=told), module, torch.float16)  # to ship it small
    if adapter is not None:
        lora.save_lora(arguments.out, adapter, torch.float16)


if __name__ == "__main__":
    main()
