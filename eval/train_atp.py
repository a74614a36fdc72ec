"""Train ATP-LLaVA's modules on the reference LLaVA, and measure whether what they keep follows scene and question.

    python -m eval.train_atp train --scenes 150 --out modules/
    python -m eval.train_atp compare modules/ --out compared.json

Training is that of `vtc train atp` without answers, so that the modules imitate the untouched model, but questions
about a scene share passes, the first word of the answer alone counts, and every step reads all questions. The
comparison asks about scenes that no training has seen: what does each question need, what do the modules keep, and what
is right with them, with the plan that they deviate from, which keeps the same number of tokens of every image (at each
place as many as the modules keep there on average), and with `vtc`, which keeps as many in all layers.
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
from scipy import stats
from tqdm.auto import tqdm

import vtc
import vtc.reference
from eval import models
from eval.adaptive import covered
from eval.conditions import conditions
from eval.tasks.base import Sample
from eval.tasks.scenes.questions import Question, ask
from eval.tasks.scenes.scene import Scene, make_scene
from eval.tasks.scenes.vocabulary import GRID, KINDS
from vtc.files import check_writable, write_text
from vtc.selectors.learned import Decoder, read_modules, save_modules
from vtc.selectors.learned.atp import Study, begin, following_the_plan, loss, multiples, needs

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


@torch.no_grad()
def study(
    loaded: models.Loaded,
    scenes: Sequence[Scene],
    questions: int,
    seed: int,
    folder: str,
    memories: dict[int, vtc.EncoderMemory] | None = None,
) -> Study:
    """Find out for every question how likely the first word of the answer changes with each multiple of the plan.

    What `vtc.train` finds out of whole answers, one by one; here the questions about a scene share a pass.
    """
    model, changed, seen = loaded.model, [], []
    vtc.compress(model, "atp", modules=folder, keep_tokens=10**6)
    places = range(len(read_modules(folder, "atp")[0].settings["shares"]))
    for index, scene in enumerate(tqdm(scenes, unit="scene", disable=None)):
        inputs = prompts(loaded, scene, ask(scene, questions, seed=seed))
        rows = len(inputs["input_ids"])
        changes, reads = [], []
        memory = vtc.EncoderMemory(rows=rows)
        with vtc.remember(model, memory if memories is None else memories.setdefault(index, memory)):
            with vtc.disabled(model):
                meant = model(**inputs, logits_to_keep=1).logits[:, -1].log_softmax(-1)
            for multiple in multiples().tolist():
                with following_the_plan(multiple) as noted:
                    said = model(**inputs, logits_to_keep=1).logits[:, -1].log_softmax(-1)
                changes.append(-torch.expm1(-(meant.exp() * (meant - said)).sum(dim=-1)))
                reads.append(
                    torch.stack([torch.stack([read for at, read in noted if at == place]) for place in places])
                )
        changed.append(torch.stack(changes, dim=1))
        seen.append(torch.stack(reads).permute(2, 0, 1, 3)[:, :, :, None])  # (rows, J, places, 1, F)
    vtc.restore(model)
    return Study(torch.cat(changed), torch.cat(seen))


def train(arguments: argparse.Namespace) -> None:
    """Train on questions about scenes of the train split; every step reads all of them."""
    loaded = models.load("reference")
    began = time.process_time()
    indices = range(arguments.first, arguments.first + arguments.scenes)
    scenes = [make_scene("train", arguments.seed, index) for index in indices]
    sizes = {"target": arguments.target, "layout": arguments.layout, "seed": arguments.initial}
    text = loaded.model.config.text_config
    shape = vtc.ModelShape(
        text.num_hidden_layers,
        family=loaded.model.config.model_type,
        width=text.hidden_size,
        vision_width=loaded.model.config.vision_config.hidden_size,
    )
    decoder = Decoder.of(text, loaded.model.model.language_model.layers)
    described, module = begin(shape, decoder=decoder, **sizes)
    save_modules(arguments.out, described, module)
    found = study(loaded, scenes, arguments.questions, arguments.seed, str(arguments.out))
    optimizer = torch.optim.AdamW(module.parameters(), lr=arguments.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps, eta_min=arguments.rate / 20)
    for step in range(arguments.steps):
        value = loss(module, found)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {float(value.detach()):.4f}", flush=True)
    told = {name: getattr(arguments, name) for name in ("steps", "rate", "seed", "initial", "first", "scenes")}
    told |= {"samples": len(found.changes), "processor_seconds": round(time.process_time() - began)}
    save_modules(arguments.out, replace(described, training=told), module)


@torch.inference_mode()
def ask_all(
    loaded: models.Loaded,
    asked: Asked,
    memories: dict[int, vtc.EncoderMemory],
    method: str = "atp",
    keep_tokens: int = 10**6,
    **options: Any,
) -> NDArray[Any]:
    """Ask every question: the mean of tokens kept over the layers, the numbers behind each place, and 1 if right."""
    vtc.compress(loaded.model, method, keep_tokens=keep_tokens, **options)
    layers = loaded.model.config.text_config.num_hidden_layers
    rows = []
    for index, group in itertools.groupby(tqdm(asked, unit="question", disable=None), key=lambda each: each[0]):
        questions = [(scene, question) for _, scene, question in group]
        inputs = prompts(loaded, questions[0][0], [question for _, question in questions])
        with vtc.remember(loaded.model, memories.setdefault(index, vtc.EncoderMemory(rows=len(questions)))):
            made = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers = loaded.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for segment, said, (_, question) in zip(vtc.report(loaded.model).segments, answers, questions, strict=True):
            counts = [selection.k for _, selection in segment.selections]
            starts = [getattr(site, "layer", 0) for site, _ in segment.selections]  # 0: before the decoder
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
    """Measure what held-out questions need, and the modules of some folders, with one plan, beside it."""
    loaded = models.load("reference")
    scenes = [make_scene("test", arguments.seed, index) for index in range(arguments.scenes)]
    asked = [(i, scene, question) for i, scene in enumerate(scenes) for question in ask(scene, arguments.questions)]
    memories: dict[int, vtc.EncoderMemory] = {}
    plans = {tuple(read_modules(str(folder), "atp")[0].settings["shares"]) for folder in arguments.modules}
    if len(plans) > 1:
        raise vtc.ConfigError("the modules have different plans; compare them one by one")
    studied = study(loaded, scenes[: arguments.needs], arguments.questions, 0, str(arguments.modules[0]), memories)
    need = np.full(len(asked), np.nan)
    need[: len(studied.changes)] = needs(studied.changes) / np.log(2)
    known = np.isfinite(need)
    kinds = np.array([question.kind for _, _, question in asked])
    causes = {
        "per object": np.array([len(scene.objects) for _, scene, _ in asked], dtype=float),
        "per 10 patches covered": np.array([covered(scene) / 10 for _, scene, _ in asked]),
        "per doubling of the need": need,
    }
    others = [(kinds == kind).astype(float) for kind in sorted(set(kinds))[1:]]

    def slope(values: NDArray[Any], cause: NDArray[Any]) -> dict[str, Any]:
        """Give the slope over all questions, and among questions of one kind, some of which few scenes allow."""
        which = np.flatnonzero(np.isfinite(values + cause))
        some, y, x = [asked[i] for i in which], values[which], cause[which]
        rest = [other[which] for other in others]
        return {
            "all": bootstrap(some, lambda at: float(slopes(y[at], x[at])[0])),
            "of one kind": bootstrap(some, lambda at: float(slopes(y[at], x[at], *(other[at] for other in rest))[0])),
        }

    def explained(values: NDArray[Any]) -> dict[str, Any]:
        return {name: slope(values, cause) for name, cause in causes.items()}

    fixed: dict[tuple[int, ...], NDArray[Any]] = {}

    def measured(folder: str) -> dict[str, Any]:
        free = ask_all(loaded, asked, memories, modules=folder)
        counts = free[:, 1:-1].mean(axis=0)
        planned = tuple(max(1, round(count)) for count in counts)
        if planned not in fixed:
            factor = tuple((counts / (np.array(*plans) * GRID**2)).tolist())
            fixed[planned] = ask_all(loaded, asked, memories, modules=folder, factor=factor)
        plan = fixed[planned]
        right = {"modules": free[:, -1], "plan": plan[:, -1]}
        return {
            "training": dict(read_modules(folder, "atp")[0].training),
            "kept": {"modules": free[:, :-1].mean(axis=0).tolist(), "plan": plan[:, :-1].mean(axis=0).tolist()},
            "spread": free[:, :-1].std(axis=0).tolist(),
            "accuracy": {name: bootstrap(asked, lambda at, v=v: float(v[at].mean())) for name, v in right.items()},
            "modules - plan": bootstrap(asked, lambda at: float((right["modules"] - right["plan"])[at].mean())),
            "slope": {
                "mean of layers": explained(free[:, 0]),
                **{f"place {place}": explained(free[:, place + 1]) for place in range(len(counts))},
            },
            "rank correlation with the need": float(stats.spearmanr(free[known, 0], need[known]).statistic),
            "kinds": {
                kind: {"kept": float(free[kinds == kind, 0].mean())}
                | {name: float(values[kinds == kind].mean()) for name, values in right.items()}
                for kind in KINDS
                if (kinds == kind).any()
            },
        }

    found = {folder.name: measured(str(folder)) for folder in arguments.modules}
    before = ask_all(loaded, asked, memories, "vtc", round(found[arguments.modules[0].name]["kept"]["modules"][0]))
    kept, right = float(before[:, 0].mean()), before[:, -1]
    return {
        "questions": len(asked),
        "scenes": len(scenes),
        "need": {
            "scenes": min(len(scenes), arguments.needs),
            "slope": explained(need),
            "factors": {
                kind: float(2 ** need[known & (kinds == kind)].mean()) for kind in KINDS if kind in kinds[known]
            },
        },
        "vtc, before the decoder": {"kept": kept, "accuracy": bootstrap(asked, lambda at: float(right[at].mean()))},
        **found,
        **{name: value for name, value in conditions("python -m eval.train_atp compare").items() if value is not None},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("--scenes", type=int, default=120)
    one.add_argument("--questions", type=int, default=8, help="about each scene (8)")
    one.add_argument("--steps", type=int, default=1500)
    one.add_argument("--rate", type=float, default=3e-3)
    one.add_argument("--target", type=float, default=0.06, help="share of tokens kept, averaged over the places")
    one.add_argument("--layout", choices=("sorted", "raster"), default="sorted")
    one.add_argument("--seed", type=int, default=11, help="of scenes and questions (11)")
    one.add_argument("--first", type=int, default=0, help="index of the first scene (0)")
    one.add_argument("--initial", type=int, default=11, help="seed of the first weights (11)")
    one.add_argument("--out", type=Path, required=True, help="folder for the modules")
    other = commands.add_parser("compare")
    other.add_argument("modules", type=Path, nargs="+", help="folders; their names are those of the results")
    other.add_argument("--scenes", type=int, default=160)
    other.add_argument("--questions", type=int, default=8, help="about each scene (8)")
    other.add_argument("--needs", type=int, default=160, help="scenes whose questions' need is measured (160)")
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
