"""Measure whether an adaptive method keeps more tokens of crowded scenes than of plain ones.

    python -m eval.adaptive free.json calibrated.json --out eval/results/atp

Draws held-out scenes, selects those that objects cover the least and the most, asks one question about each, and counts
for every configuration the tokens kept in the two groups. Writes table.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from tqdm.auto import tqdm

import vtc
from eval import models
from eval.conditions import conditions
from eval.tasks.base import Sample
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import Scene, make_scene
from vtc.files import check_writable, write_text


def covered(scene: Scene) -> int:
    """Count the patches that objects of the scene cover."""
    return len({patch for thing in scene.things for patch in thing.patches})


def extremes(drawn: int, group: int, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Return the `group` plainest and the `group` fullest of `drawn` held-out scenes."""
    scenes = sorted((make_scene("test", seed, index) for index in range(drawn)), key=covered)
    return scenes[:group], scenes[-group:]


@torch.inference_mode()
def kept(
    loaded: models.Loaded, scenes: Sequence[Scene], configs: Sequence[vtc.CompressionConfig]
) -> list[NDArray[Any]]:
    """Count kept tokens: for each configuration (scenes, 1 + stages), the mean over layers, then after each stage."""
    counts: list[list[list[float]]] = [[] for _ in configs]
    for scene in tqdm(scenes, unit="scene", disable=None):
        question = ask(scene, 1)[0]
        sample = Sample(
            id="", question=question.text, images=(lambda scene=scene: scene.image,), target=question.answer
        )
        inputs = models.inputs(loaded, [sample], [sample.open()])
        for config, rows in zip(configs, counts, strict=True):
            with vtc.compressed(loaded.model, config) as model:
                model(**inputs, logits_to_keep=1)
                report = vtc.report(model)
            stages = [float(selection.k) for _, selection in report.segments[0].selections]
            rows.append([report.average_visual_tokens, *stages])
    return [np.array(rows) for rows in counts]


def table(names: Sequence[str], counts: Sequence[NDArray[Any]], cover: NDArray[Any], group: int) -> str:
    """Return one line per configuration; the first `group` scenes are the plain ones."""
    lines = [
        "| configuration | kept, mean of layers | plain scenes | full scenes | difference, 95 % | rank correlation, p |"
        " behind each place: plain, full |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, rows in zip(names, counts, strict=True):
        mean, plain, full = rows[:, 0], rows[:group], rows[group:]
        low, high = stats.ttest_ind(full[:, 0], plain[:, 0], equal_var=False).confidence_interval()
        rank = stats.spearmanr(mean, cover)
        stages = ", ".join(f"{a:.1f} {b:.1f}" for a, b in zip(plain[:, 1:].mean(0), full[:, 1:].mean(0), strict=True))
        lines.append(
            f"| {name} | {mean.mean():.1f} ± {mean.std():.1f} | {plain[:, 0].mean():.1f} | {full[:, 0].mean():.1f} | "
            f"{(full[:, 0] - plain[:, 0]).mean():+.1f} ({low:+.1f} to {high:+.1f}) | "
            f"{rank.statistic:+.2f}, {rank.pvalue:.1g} | {stages} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", help="files that CompressionConfig.save wrote")
    parser.add_argument("--model", default="reference", help="reference, reference:NAME, or a checkpoint's folder")
    parser.add_argument("--drawn", type=int, default=300, help="number of scenes drawn (300)")
    parser.add_argument("--group", type=int, default=30, help="size of each of the two groups (30)")
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    arguments = parser.parse_args(argv)
    configs = [vtc.CompressionConfig.load(path) for path in arguments.configs]
    arguments.out.mkdir(parents=True, exist_ok=True)
    check_writable(arguments.out / "table.md")
    loaded = models.load(arguments.model)
    plain, full = extremes(arguments.drawn, arguments.group, arguments.seed)
    scenes = [*plain, *full]
    counts = kept(loaded, scenes, configs)
    cover = np.array([covered(scene) for scene in scenes])
    stated = {
        "model": loaded.name,
        "weights": loaded.weights,
        "dtype": "float32",
        "scenes": f"{arguments.group} plain ones ({cover[: arguments.group].mean():.0f} of 256 patches covered) and "
        f"{arguments.group} full ones ({cover[arguments.group :].mean():.0f}), of {arguments.drawn} drawn with seed "
        f"{arguments.seed}; one question each",
        **{name: value for name, value in conditions("python -m eval.adaptive ...").items() if value is not None},
        **{path.stem: config.to_dict() for path, config in zip(arguments.configs, configs, strict=True)},
    }
    text = table([path.stem for path in arguments.configs], counts, cover, arguments.group)
    notes = "\n".join(f"- {name}: {value}" for name, value in stated.items())
    write_text(arguments.out / "table.md", f"# Kept of plain and of full scenes\n\n{text}\n\n{notes}\n")
    print(text)


if __name__ == "__main__":
    main()
