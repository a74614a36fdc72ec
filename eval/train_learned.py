"""Train `crosslmm` and `vision-remember` on the reference LLaVA, and compare them with `pool`.

    python -m eval.train_learned cache --split train --seed 11 --count 2400 --folder cache/train-11
    python -m eval.train_learned cache --split test --seed 21 --count 208 --folder cache/test-21
    python -m eval.train_learned train crosslmm --cache cache/ --tokens 4 --steps 300 --out crosslmm-4
    python -m eval.train_learned compare crosslmm-4 vision-remember-4 --cache cache/ --table table.json

As `eval.train_llava_mini`, whose reading of packed questions this shares: the tower's features are cached, here those
of three of its layers, and the decoder is frozen but for a low-rank adapter with ``--lora``. `vtc.train` does the same
without a cache, on anybody's pictures.
"""

from __future__ import annotations

import argparse
import json
import pickle
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
import vtc.reference
from eval.reference.train.__main__ import Data
from eval.reference.train.cache import normalised
from eval.reference.train.packing import IGNORE
from eval.tasks.scenes.scene import make_scene
from eval.tasks.scenes.vocabulary import GRID
from eval.train_llava_mini import FIRST, Reader, Update, interval, questions, right, selected
from vtc.selectors import learned
from vtc.selectors.learned import crosslmm, lora, vision_remember

GATES = 10
"""How much faster single numbers, which are gates, learn than matrices."""

METHODS: dict[str, Any] = {"crosslmm": crosslmm, "vision-remember": vision_remember}


@torch.no_grad()
def cache(split: Any, seed: int, count: int, folder: Path) -> None:
    """Cache what the layers of the tower that `vision-remember` reads give for scenes; LLaVA reads the last of them."""
    model, _ = vtc.reference.load("llava")
    levels = begin("vision-remember", model)[0].settings["levels"]
    folder.mkdir(parents=True, exist_ok=True)
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (count, len(levels), GRID**2, 384))
    things = []
    for first in range(0, count, 16):
        scenes = [make_scene(split, seed, index) for index in range(first, min(first + 16, count))]
        pixels = normalised(np.stack([scene.image for scene in scenes]))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features[first : first + len(scenes)] = torch.stack([hidden[n + 1][:, 1:] for n in levels], 1).half().numpy()
        things += [scene.things for scene in scenes]
    features.flush()
    (folder / "things.pkl").write_bytes(pickle.dumps(things))
    (folder / "state.json").write_text(json.dumps({"split": split, "seed": seed, "count": count}))


def begin(method: str, model: Any, seed: int = 0) -> tuple[learned.Modules, nn.Module]:
    """Make untrained modules of a method for the reference LLaVA, small enough to ship."""
    config = model.config
    shape = vtc.ModelShape(
        config.text_config.num_hidden_layers,
        family=config.model_type,
        width=config.text_config.hidden_size,
        vision_width=config.vision_config.hidden_size,
        feature_layer=config.vision_config.num_hidden_layers + config.vision_feature_layer,
    )
    made: tuple[learned.Modules, nn.Module] = METHODS[method].begin(shape, seed=seed)
    return made


class Updating:
    """Pooled tokens, and a method that updates hidden states behind them, on a batch of scenes at once."""

    def __init__(self, reader: Reader, module: Any, count: int) -> None:
        self.reader, self.module = reader, module
        picture = torch.zeros(GRID**2, 1)
        choice = vtc.select("pool", features=picture, grid_thw=(1, GRID, GRID), keep_tokens=count)
        self.count, self.places, self.slots = count, choice.keep, choice.slots
        self.pooling = torch.zeros(count, GRID**2).index_put((choice.slots, torch.arange(GRID**2)), torch.tensor(1.0))
        self.pooling /= self.pooling.sum(dim=1, keepdim=True)
        line = torch.arange(GRID)
        rows, columns = (axis.flatten() for axis in torch.meshgrid(line, line, indexing="ij"))
        self.coords = torch.stack([torch.zeros_like(rows), torch.zeros_like(rows), rows, columns], dim=1)

    def read(self, levels: Tensor) -> tuple[Tensor, Tensor, Update]:
        """Give tokens, their places and the updates for features (B, levels, N, D) of the tower."""
        projected = self.reader.project(levels[:, -1].float()).float()
        places = self.places.expand(len(levels), -1)
        stop = FIRST + self.count
        if isinstance(self.module, crosslmm.CrossAttentions):
            known = self.module.remember(projected, self.coords)

            def update(layer: int, hidden: Tensor) -> Tensor:
                if layer not in self.module.layers:
                    return hidden
                visual = self.module("visual", layer, hidden[:, FIRST:stop], known[f"visual {layer}"])
                text = self.module("text", layer, hidden[:, stop:], known[f"text {layer}"])
                return hidden + torch.cat([torch.zeros_like(hidden[:, :FIRST]), visual, text], dim=1)

        else:
            features = levels.transpose(1, 2).flatten(0, 1)
            known = self.module.remember(features, self.coords.repeat(len(levels), 1))
            owner = (torch.arange(len(levels))[:, None] * self.count + self.slots).flatten()

            def update(layer: int, hidden: Tensor) -> Tensor:
                if layer not in self.module.layers:
                    return hidden
                visual = hidden[:, FIRST:stop]
                new = self.module(layer, visual.flatten(0, 1), known[f"layer {layer}"], owner).view(visual.shape)
                return torch.cat([hidden[:, :FIRST], visual + new, hidden[:, stop:]], dim=1)

        return self.pooling @ projected, places, update


@contextmanager
def adapted(reader: Reader, adapter: lora.LoraAdapter | None) -> Iterator[None]:
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
    reader: Reader,
    updating: Updating,
    adapter: lora.LoraAdapter | None,
    data: Data,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
) -> float:
    """Train modules, and an adapter if there is one; return the seconds of the processor that it took."""
    weights = [*updating.module.parameters(), *(() if adapter is None else adapter.parameters())]
    gates = [weight for weight in weights if not weight.ndim]
    groups = [{"params": [weight for weight in weights if weight.ndim]}, {"params": gates}]
    rates = [rate, GATES * rate]
    optimizer = torch.optim.AdamW(groups[: 1 + bool(gates)], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates[: 1 + bool(gates)], total_steps=steps, pct_start=0.1
    )
    chance, began, losses = np.random.default_rng(seed), time.process_time(), []
    for step in range(steps):
        indices = chance.integers(len(data.scenes), size=batch)
        text = questions(reader.packer, data, indices, seed=1 + step)
        with torch.autocast("cpu", torch.bfloat16), adapted(reader, adapter):
            logits = reader.answer(data.batch(indices), updating.read, text)
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


def compare(reader: Reader, data: Data, folders: Sequence[Path]) -> dict[str, Any]:
    """Measure modules beside methods without any, at their numbers of tokens."""
    rows: list[dict[str, Any]] = []

    def add(method: str, count: int, scenes: list[np.ndarray], **more: Any) -> None:
        mean, low, high = interval(scenes)
        asked = sum(map(len, scenes))
        rows.append({"method": method, "tokens": count, "accuracy": mean, "low": low, "high": high, **more})
        print(f"{method} {count}: {mean:.3f} ({low:.3f} to {high:.3f}) of {asked}", flush=True)

    told = {folder: json.loads((folder / "modules.json").read_text()) for folder in folders}
    for count in sorted({one["training"]["tokens"] for one in told.values()}):
        for method in ("random", "uniform", "pool", "vtc"):
            add(method, count, right(reader, selected(reader, method, count), data))
        for folder, one in told.items():
            if one["training"]["tokens"] != count:
                continue
            selector = vtc.registry.get_selector(one["method"], modules=str(folder))
            adapter = lora.read_lora(folder, one["method"])
            with adapted(reader, adapter):
                scenes = right(reader, Updating(reader, selector.module, count).read, data)
            parts = [selector.module, *([] if adapter is None else [adapter])]
            sizes = [sum(weight.numel() for weight in part.parameters()) for part in parts]
            add(one["method"], count, scenes, parameters=sizes, training=one["training"])
    return {"scenes": len(data.scenes), "split": "test", "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    caching = verbs.add_parser("cache", help="features of scenes")
    caching.add_argument("--split", choices=("train", "test"), required=True)
    caching.add_argument("--count", type=int, required=True)
    caching.add_argument("--folder", type=Path, required=True)
    training = verbs.add_parser("train", help="modules of a method")
    training.add_argument("method", choices=METHODS)
    training.add_argument("--out", type=Path, required=True, help="folder for the modules")
    training.add_argument("--tokens", type=int, required=True, help="pooled tokens per picture")
    training.add_argument("--steps", type=int, default=300)
    training.add_argument("--batch", type=int, default=8)
    training.add_argument("--rate", type=float, default=2e-3)
    training.add_argument("--lora", type=int, help="rank of an adapter of the decoder")
    comparing = verbs.add_parser("compare", help="with methods without modules")
    comparing.add_argument("folders", nargs="+", type=Path)
    comparing.add_argument("--table", type=Path, help="file for the result")
    for verb in (caching, training):
        verb.add_argument("--seed", type=int, default=0)
    for verb in (training, comparing):
        verb.add_argument("--cache", type=Path, required=True, help="folder of cached scenes, train and test")
    arguments = parser.parse_args(argv)
    if arguments.verb == "cache":
        cache(arguments.split, arguments.seed, arguments.count, arguments.folder)
        return
    reader = Reader()
    if arguments.verb == "compare":
        found = compare(reader, Data.load("test", arguments.cache), arguments.folders)
        if arguments.table:
            arguments.table.write_text(json.dumps(found, indent=1) + "\n")
        return
    modules, module = begin(arguments.method, reader.model, arguments.seed)
    adapter = None if arguments.lora is None else lora.begin_lora(reader.decoder, arguments.lora, arguments.seed)
    data = Data.load("train", arguments.cache)
    given = {name: getattr(arguments, name) for name in ("steps", "batch", "rate", "seed")}
    seconds = train(reader, Updating(reader, module, arguments.tokens), adapter, data, **given)
    told = given | {"tokens": arguments.tokens, "lora": arguments.lora, "samples": len(data.scenes)}
    told["processor_seconds"] = round(seconds)
    learned.save_modules(arguments.out, replace(modules, training=told), module, torch.float16)  # to ship it small
    if adapter is not None:
        lora.save_lora(arguments.out, adapter, torch.float16)


if __name__ == "__main__":
    main()
