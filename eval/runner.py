"""Every sample through every cell, written down row by row."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

import vtc
from eval import models
from eval.bounds import GivenSelector, register
from eval.cells import BLIND, BOUNDS, FULL, Cell
from eval.journal import Journal, Row
from eval.models import Loaded
from eval.tasks.base import Media, Sample, Task


def conditions(command: str | None = None) -> dict[str, Any]:
    """What a reader needs to know about machine and versions."""
    return {
        "command": command if command is not None else " ".join(["python -m eval", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vtc": vtc.__version__,
        "git": _git_state(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git_state() -> str | None:
    """Commit, with a plus where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        run = [
            subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0] + ("+" if run[1] else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def shard() -> tuple[int, int]:
    """Number of this process and of all, as `accelerate launch` and `torchrun` tell it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def run(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    cells: Sequence[Cell],
    journal: Journal,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Answer all samples in all cells; what the journal holds already is passed over.

    The model with all its tokens always goes first in a batch, because agreement is measured against it. A sample that
    cannot be read becomes a row with its error, in every cell. Of several processes each takes every n-th batch.

    Parameters
    ----------
    loaded : Loaded
    task : Task
    samples : sequence of Sample
    cells : sequence of Cell
    journal : Journal
    batch_size : int
        Cells that know the truth go one by one whatever it is.
    seed : int
        For methods that draw.
    progress : bool
        Whether to show a bar.
    """
    if cells[0] != FULL:
        cells = [FULL, *(cell for cell in cells if cell != FULL)]
    rank, world = shard()
    numbered = list(enumerate(samples))
    batches = [numbered[first : first + batch_size] for first in range(0, len(numbered), batch_size)][rank::world]
    total = sum(len(batch) for batch in batches) * len(cells)
    with tqdm(total=total, unit="answer", disable=not progress, dynamic_ncols=True) as bar:
        for batch in batches:
            for row in _batch_rows(loaded, task, batch, cells, journal.has, seed):
                if not journal.has(row["cell"], row["sample"]):
                    journal.add(row)
            bar.update(len(batch) * len(cells))


def _batch_rows(
    loaded: Loaded,
    task: Task,
    batch: Sequence[tuple[int, Sample]],
    cells: Sequence[Cell],
    has: Callable[[str, str], bool],
    seed: int,
) -> Iterator[Row]:
    wanted = [cell for cell in cells if any(not has(cell.name, sample.id) for _, sample in batch)]
    if not wanted:
        return
    opened: list[tuple[int, Sample, Media]] = []
    for order, sample in batch:
        try:
            opened.append((order, sample, sample.open()))
        except vtc.InputError as error:
            for number, cell in enumerate(cells):
                yield _row(order, sample, number, cell) | {"error": str(error)}
    for _, alike in groupby(opened, key=lambda each: None if each[2].video is None else len(each[2].video.frames)):
        yield from _answered_rows(loaded, task, list(alike), cells, wanted, seed)


def _answered_rows(
    loaded: Loaded,
    task: Task,
    opened: Sequence[tuple[int, Sample, Media]],
    cells: Sequence[Cell],
    wanted: Sequence[Cell],
    seed: int,
) -> Iterator[Row]:
    full_text, full_logp = _answers(loaded, task, opened)
    for number, cell in enumerate(cells):
        if cell not in wanted:
            continue
        at_a_time = 1 if cell.method in BOUNDS else len(opened)
        for first in range(0, len(opened), at_a_time):
            part = opened[first : first + at_a_time]
            told: dict[str, Any] = {}
            texts, logp = full_text[first : first + at_a_time], full_logp[first : first + at_a_time]
            if cell == BLIND:
                texts, logp = _answers(loaded, task, part, blind=True)
            elif cell != FULL:
                with vtc.compressed(loaded.model, _config(task, cell, part[0][1], seed)):
                    texts, logp = _answers(loaded, task, part)
                    report = vtc.report(loaded.model)
                told = {
                    "selector_ms": report.selector_ms / len(part),
                    "flops_share": _ratio(report.prefill_flops_after, report.prefill_flops_before),
                }
            base = full_logp[first : first + at_a_time]
            kl = (base.exp() * (base - logp)).nan_to_num(0.0).sum(dim=-1)
            for place, (order, sample, _) in enumerate(part):
                yield _row(order, sample, number, cell) | {
                    "prediction": texts[place],
                    "scores": task.score(sample, texts[place]),
                    "agrees": texts[place] == full_text[first + place],
                    "kl": max(0.0, float(kl[place])),
                    "kept": 1.0 if cell == FULL else 0.0 if cell == BLIND else _kept(report, place),
                    **told,
                }


def _answers(
    loaded: Loaded, task: Task, opened: Sequence[tuple[int, Sample, Media]], *, blind: bool = False
) -> tuple[list[str], torch.Tensor]:
    samples, media = [sample for _, sample, _ in opened], [shown for _, _, shown in opened]
    encoded = models.inputs(loaded, samples, media)
    return models.answer(loaded, models.blinded(encoded) if blind else encoded, task.max_new_tokens)


def _row(order: int, sample: Sample, number: int, cell: Cell) -> Row:
    kind = sample.meta.get("kind")
    return {
        "cell": cell.name,
        "cell_order": number,
        "sample": sample.id,
        "order": order,
        "group": sample.group if sample.group is not None else sample.id,
        **({"kind": kind} if kind is not None else {}),
    }


def _config(task: Task, cell: Cell, sample: Sample, seed: int) -> vtc.CompressionConfig:
    if cell.method in BOUNDS:
        register()
        keep = task.bound(cell.method, sample, cell.keep_ratio, cell.keep_tokens)
        return vtc.CompressionConfig(
            GivenSelector.name, keep_tokens=len(keep), positions=cell.positions, options={"keep": tuple(keep)}
        )
    config = cell.config()
    return vtc.CompressionConfig.from_dict({**config.to_dict(), "seed": seed})


def _kept(report: vtc.Report, row: int) -> float:
    """Share of a row's visual tokens, averaged over the decoder layers as the papers do."""
    before = sum(segment.tokens_before for segment in report.segments if segment.row == row)
    text = report.lengths_before[row] - before
    mean = statistics.fmean(lengths[row] for lengths in report.lengths_per_layer) - text
    return mean / before if before else 1.0


def _ratio(after: int | None, before: int | None) -> float | None:
    return None if after is None or not before else after / before


def timings(
    loaded: Loaded, samples: Sequence[Sample], cells: Sequence[Cell], *, rounds: int = 3, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Time to the first token of one sample at a time, in every cell, relative to all tokens.

    Every round goes through all cells of a sample in an order of its own, after one round that does not count, so that
    a slow minute of the machine hits each alike.

    Returns
    -------
    dict of cell name to dict
        ``ttft`` in seconds (median over samples and rounds), ``speed_up`` over all tokens (median of the paired
        ratios), and ``selector_share``: the part of `ttft` spent choosing.
    """
    cells = [cell for cell in cells if cell.method not in BOUNDS and cell != BLIND]
    seconds: dict[str, list[float]] = {cell.name: [] for cell in cells}
    selecting: dict[str, list[float]] = {cell.name: [] for cell in cells}
    for sample in samples:
        encoded = models.inputs(loaded, [sample], [sample.open()])
        for number in range(-1, rounds):
            for cell in random.Random(number).sample(cells, len(cells)):
                took, share = _first_token(loaded, encoded, cell, seed)
                if number >= 0:
                    seconds[cell.name].append(took)
                    selecting[cell.name].append(share)
    whole = seconds[FULL.name]
    return {
        name: {
            "ttft": statistics.median(each),
            "speed_up": statistics.median(w / s for w, s in zip(whole, each, strict=True)),
            "selector_share": statistics.median(selecting[name]),
        }
        for name, each in seconds.items()
    }


@torch.inference_mode()
def _first_token(loaded: Loaded, encoded: Any, cell: Cell, seed: int) -> tuple[float, float]:
    config = cell.config()
    if config is not None:
        vtc.compress(loaded.model, vtc.CompressionConfig.from_dict({**config.to_dict(), "seed": seed}))
    try:
        start = time.perf_counter()
        loaded.model(**encoded, use_cache=True, logits_to_keep=1)
        took = time.perf_counter() - start
        share = vtc.report(loaded.model).selector_ms / 1e3 / took if config is not None else 0.0
    finally:
        vtc.restore(loaded.model)
    return took, share


def in_groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by cell, cells in their order."""
    ordered = sorted(rows, key=lambda row: (row["cell_order"], row["order"]))
    return {name: list(group) for name, group in groupby(ordered, key=lambda row: row["cell"])}
