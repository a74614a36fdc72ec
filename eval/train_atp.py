"""Train ATP-LLaVA's modules on the reference LLaVA, and measure whether what they keep follows scene and question.

    python -m eval.train_atp train --scenes 72 --out modules/
    python -m eval.train_atp compare modules/ --scenes 128 --out imitation.json

Training is that of `vtc train atp` without answers, so that the modules imitate the untouched model, but questions
about a scene share passes, and the first word of the answer alone counts. The comparison asks about scenes that no
training has seen, once with the modules and once with the plan that they deviate from, which keeps the same number of
tokens of every image: at each place as many as the modules keep there on average.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

import vtc
import vtc.reference
from eval import models
from eval.conditions import conditions
from eval.tasks.base import Sample
from eval.tasks.scenes.questions import Question, ask
from eval.tasks.scenes.scene import Scene, make_scene
from eval.tasks.scenes.vocabulary import GRID, KINDS
from vtc.files import check_writable, write_text
from vtc.selectors.learned import read_modules, save_modules
from vtc.selectors.learned.atp import Study, begin, following_the_plan, loss, multiples

Asked = Sequence[tuple[int, Scene, Question]]
"""Questions, each with its scene and the number of that."""

DRAWS = 2000
"""Bootstrap samples of scenes behind an interval."""


def prompts(loaded: models.Loaded, scene: Scene, questions: Sequence[Question]) -> Any:
    """Encode questions about one scene as the rows of a batch."""
    samples = [
        Sample(id="", question=question.text, images=(lambda: scene.image,), target=question.answer)
        for question in questions
    ]
    return models.inputs(loaded, samples, [sample.open() for sample in samples])


@torch.inference_mode()
def study(loaded: models.Loaded, scenes: Sequence[Scene], questions: int, seed: int, folder: str) -> list[Study]:
    """Find out for every question how likely the first word of the answer changes with each multiple of the plan.

    What `vtc.train` finds out of whole answers, one by one; here the questions about a scene share a pass.
    """
    model, found = loaded.model, []
    vtc.compress(model, "atp", modules=folder, keep_tokens=10**6)
    places = range(len(read_modules(folder, "atp")[0].settings["shares"]))
    for scene in tqdm(scenes, unit="scene", disable=None):
        inputs = prompts(loaded, scene, ask(scene, questions, seed=seed))
        rows = len(inputs["input_ids"])
        changes, reads = [], []
        with vtc.remember(model, vtc.EncoderMemory(rows=rows)):
            with vtc.disabled(model):
                meant = model(**inputs, logits_to_keep=1).logits[:, -1].log_softmax(-1)
            for multiple in multiples().tolist():
                with following_the_plan(multiple) as noted:
                    said = model(**inputs, logits_to_keep=1).logits[:, -1].log_softmax(-1)
                changes.append(-torch.expm1(-(meant.exp() * (meant - said)).sum(dim=-1)))
                reads.append(
                    torch.stack([torch.stack([read for at, read in noted if at == place]) for place in places])
                )
        change, read = torch.stack(changes, dim=1), torch.stack(reads)  # (rows, J), (J, places, rows, F)
        found += [Study(change[row], read[:, :, row : row + 1]) for row in range(rows)]
    vtc.restore(model)
    return found


def train(arguments: argparse.Namespace) -> None:
    """Train on questions about scenes of the train split."""
    loaded = models.load("reference")
    began = time.process_time()
    scenes = [make_scene("train", arguments.seed, index) for index in range(arguments.scenes)]
    sizes = {"target": arguments.target, "layout": arguments.layout, "seed": arguments.seed}
    text = loaded.model.config.text_config
    shape = vtc.ModelShape(
        text.num_hidden_layers,
        family=loaded.model.config.model_type,
        width=text.hidden_size,
        vision_width=loaded.model.config.vision_config.hidden_size,
    )
    described, module = begin(shape, **sizes)
    save_modules(arguments.out, described, module)
    found = study(loaded, scenes, arguments.questions, arguments.seed, str(arguments.out))
    changes, reads = torch.stack([each.changes for each in found]), torch.stack([each.reads for each in found])
    optimizer = torch.optim.AdamW(module.parameters(), lr=arguments.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps, eta_min=arguments.rate / 20)
    chance = torch.Generator().manual_seed(arguments.seed)
    for step in range(arguments.steps):
        picked = torch.randint(len(found), (arguments.batch,), generator=chance)
        value = torch.stack([loss(module, Study(changes[i], reads[i])) for i in picked.tolist()]).mean()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {float(value.detach()):.4f}", flush=True)
    told = {name: getattr(arguments, name) for name in ("steps", "batch", "rate", "seed", "scenes")}
    told |= {"samples": len(found), "seconds": round(time.process_time() - began)}
    save_modules(arguments.out, replace(described, training=told), module)


@torch.inference_mode()
def ask_all(
    loaded: models.Loaded, asked: Asked, memories: dict[int, vtc.EncoderMemory], **options: Any
) -> NDArray[Any]:
    """Ask every question: the mean of tokens kept over the layers, the numbers behind each place, and 1 if right."""
    vtc.compress(loaded.model, "atp", keep_tokens=10**6, **options)
    layers = loaded.model.config.text_config.num_hidden_layers
    rows = []
    for index, group in itertools.groupby(tqdm(asked, unit="question", disable=None), key=lambda each: each[0]):
        questions = [(scene, question) for _, scene, question in group]
        inputs = prompts(loaded, questions[0][0], [question for _, question in questions])
        memories.setdefault(index, vtc.EncoderMemory(rows=len(questions)))
        with vtc.remember(loaded.model, memories[index]):
            made = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers = loaded.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for segment, said, (_, question) in zip(vtc.report(loaded.model).segments, answers, questions, strict=True):
            counts = [selection.k for _, selection in segment.selections]
            starts = [site.layer for site, _ in segment.selections]
            spans = np.diff([0, *starts, layers])
            mean = float(np.dot([GRID**2, *counts], spans)) / layers
            rows.append([mean, *counts, float(said.strip() == question.answer)])
    vtc.restore(loaded.model)
    return np.array(rows)


def bootstrap(asked: Asked, value: Callable[[NDArray[Any]], float], seed: int = 0) -> tuple[float, float, float]:
    """Give a value of all questions, and its 95 % interval by drawing scenes; `value` takes indices of questions."""
    scenes = np.array([index for index, _, _ in asked])
    members = [np.flatnonzero(scenes == index) for index in np.unique(scenes)]
    chance = np.random.default_rng(seed)
    drawn = [value(np.concatenate([members[i] for i in chance.integers(len(members), size=len(members))]))
             for _ in range(DRAWS)]  # fmt: skip
    low, high = np.quantile(drawn, [0.025, 0.975])
    return value(np.arange(len(asked))), float(low), float(high)


def slopes(kept: NDArray[Any], *causes: NDArray[Any]) -> NDArray[Any]:
    """Fit ``kept = a + b_1 cause_1 + ...`` and return the slopes b."""
    table = np.stack([np.ones(len(kept)), *causes], axis=1)
    fitted: NDArray[Any] = np.linalg.lstsq(table, kept, rcond=None)[0]
    return fitted[1:]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the modules of a folder beside their plan."""
    loaded = models.load("reference")
    scenes = [make_scene("test", arguments.seed, index) for index in range(arguments.scenes)]
    asked = [(i, scene, question) for i, scene in enumerate(scenes) for question in ask(scene, arguments.questions)]
    memories: dict[int, vtc.EncoderMemory] = {}
    folder = str(arguments.modules)
    shares = np.array(read_modules(folder, "atp")[0].settings["shares"])
    free = ask_all(loaded, asked, memories, modules=folder)
    factor = free[:, 1:-1].mean(axis=0) / (shares * GRID**2)
    fixed = ask_all(loaded, asked, memories, modules=folder, factor=tuple(factor.tolist()))
    clutter = np.array([len(scene.objects) for _, scene, _ in asked], dtype=float)
    need = np.array([len(question.targets) for _, _, question in asked], dtype=float)
    kinds = np.array([question.kind for _, _, question in asked])
    kept, right, base = free[:, 0], free[:, -1], fixed[:, -1]
    places = {f"place {place}": free[:, 1 + place] for place in range(len(shares))}
    found: dict[str, Any] = {
        "questions": len(asked),
        "scenes": len(scenes),
        "modules": dict(read_modules(folder, "atp")[0].training),
        "kept": {"modules": free[:, :-1].mean(axis=0).tolist(), "plan": fixed[:, :-1].mean(axis=0).tolist()},
        "spread": free[:, :-1].std(axis=0).tolist(),
        "accuracy": {
            "modules": bootstrap(asked, lambda at: float(right[at].mean())),
            "plan": bootstrap(asked, lambda at: float(base[at].mean())),
            "difference": bootstrap(asked, lambda at: float((right - base)[at].mean())),
        },
        "slope": {
            name: {
                "per object": bootstrap(asked, lambda at, k=values: float(slopes(k[at], clutter[at])[0])),
                "per thing asked about": bootstrap(asked, lambda at, k=values: float(slopes(k[at], need[at])[0])),
                "per object, at equal need": bootstrap(
                    asked, lambda at, k=values: float(slopes(k[at], clutter[at], need[at])[0])
                ),
            }
            for name, values in {"mean of layers": kept, **places}.items()
        },
        "kinds": {
            kind: [float(kept[kinds == kind].mean()), float(right[kinds == kind].mean()),
                   float(base[kinds == kind].mean())]
            for kind in KINDS
            if (kinds == kind).any()
        },
        **{name: value for name, value in conditions("python -m eval.train_atp compare").items() if value is not None},
    }  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("--scenes", type=int, default=96)
    one.add_argument("--questions", type=int, default=8, help="about each scene (8)")
    one.add_argument("--steps", type=int, default=600)
    one.add_argument("--batch", type=int, default=32)
    one.add_argument("--rate", type=float, default=1e-2)
    one.add_argument("--target", type=float, default=0.06, help="share of tokens kept, averaged over the places")
    one.add_argument("--layout", choices=("sorted", "raster"), default="sorted")
    one.add_argument("--seed", type=int, default=11)
    one.add_argument("--out", type=Path, required=True, help="folder for the modules")
    other = commands.add_parser("compare")
    other.add_argument("modules", type=Path)
    other.add_argument("--scenes", type=int, default=160)
    other.add_argument("--questions", type=int, default=8, help="about each scene (8)")
    other.add_argument("--seed", type=int, default=9)
    other.add_argument("--out", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        train(arguments)
        return
    check_writable(arguments.out)
    found = compare(arguments)
    text = json.dumps(found, indent=1)
    write_text(arguments.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
