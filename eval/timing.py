"""Measures time and memory of every run, interleaved with the uncompressed model."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

import vtc
from eval import models, resizing
from eval.models import Loaded
from eval.results_log import ResultsLog, Row
from eval.runs import BLIND, BOUNDS, FULL, Run
from eval.tasks.base import Media, Sample

DECODE_TOKENS = 16

FIGURES = ("speed_up", "ttft", "decode_rate", "selector_ms", "host_mib", "device_mib")
"""The figures of one measurement: time to first token of the uncompressed model in the same round divided by that of
this run; time to first token in seconds, vision tower included; tokens per second after it; milliseconds spent in the
selector; peaks of host and device memory."""


def measure(
    loaded: Loaded,
    samples: Iterable[Sample],
    runs: Sequence[Run],
    log: ResultsLog,
    *,
    count: int = 6,
    rounds: int = 3,
    seed: int = 0,
    decode_tokens: int = DECODE_TOKENS,
    progress: bool = True,
) -> None:
    """Time every run on one sample at a time, except what the log has already.

    Every round times all runs on a sample in a random order, after one untimed round, so that a slow period of the
    machine affects all runs alike. An interrupted round is repeated as a whole.

    Parameters
    ----------
    loaded : Loaded
    samples : iterable of Sample
        The first `count` readable ones are timed.
    runs : sequence of Run
        The bounds and the blind model are left out: nobody deploys them.
    log : ResultsLog
    count, rounds, seed, decode_tokens : int
    progress : bool
    """
    runs = [run for run in runs if run.method not in BOUNDS and run != BLIND]
    readable = islice(_readable(samples), count)
    with tqdm(total=count * rounds, unit="round", disable=not progress, dynamic_ncols=True) as bar:
        for order, (sample, media) in enumerate(readable):
            wanted = [n for n in range(rounds) if not all(log.has(run.name, f"{sample.id}#{n}") for run in runs)]
            bar.update(rounds - len(wanted))
            shown = {
                run.name: models.inputs(
                    loaded, [sample], [resizing.resized(loaded, sample, media, run) if run.resizes else media]
                )
                for run in runs
                if wanted and (run.resizes or run == FULL)
            }
            for number in (-1, *wanted) if wanted else ():  # round -1 is the untimed one
                taken = {
                    run.name: one(loaded.model, shown.get(run.name, shown[FULL.name]), run.plan(seed), decode_tokens)
                    for run in random.Random(number).sample(runs, len(runs))
                }
                for run in runs if number >= 0 else ():
                    paired = {"speed_up": taken[FULL.name]["ttft"] / taken[run.name]["ttft"]}
                    key = {"run": run.name, "sample": f"{sample.id}#{number}", "order": order}
                    log.add({**key, **taken[run.name], **paired})
                bar.update(int(number >= 0))


def _readable(samples: Iterable[Sample]) -> Iterator[tuple[Sample, Media]]:
    for sample in samples:
        try:
            yield sample, sample.open()
        except vtc.InputError:  # the error is in the row of its answer
            continue


def summary(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return the median of every figure by run."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        figures = found.setdefault(row["run"], {name: [] for name in FIGURES})
        for name in FIGURES:
            if row[name] is not None:
                figures[name].append(row[name])
    return {
        run: {name: statistics.median(values) for name, values in figures.items() if values}
        for run, figures in found.items()
    }


@torch.inference_mode()
def one(
    model: Any, encoded: Mapping[str, Any], plan: Sequence[vtc.CompressionConfig], decode_tokens: int
) -> dict[str, float | None]:
    """Time one answer of a fixed length; the model is left uncompressed.

    Parameters
    ----------
    model : PreTrainedModel
    encoded : mapping
        Inputs of one row.
    plan : sequence of CompressionConfig
        Without any the uncompressed model is timed.
    decode_tokens : int
        Length of the answer, at least 2.
    """
    if plan:
        vtc.compress(model, plan)
    try:
        on_cuda = model.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        host_known = _reset_host_peak()
        times = _TokenTimes(model.device)
        model.generate(
            **encoded,
            do_sample=False,
            min_new_tokens=decode_tokens,
            max_new_tokens=decode_tokens,
            stopping_criteria=StoppingCriteriaList([times]),
        )
        host = _host_peak_mib() if host_known else None
        device = torch.cuda.max_memory_allocated(model.device) / 2**20 if on_cuda else None
        selector_ms = vtc.report(model).selector_ms if plan else 0.0
    finally:
        vtc.restore(model)
    decoding = times.tokens[-1] - times.tokens[0]
    return {
        "ttft": times.tokens[0] - times.start,
        "decode_rate": (len(times.tokens) - 1) / decoding if decoding > 0 else None,
        "selector_ms": selector_ms,
        "host_mib": host,
        "device_mib": device,
    }


class _TokenTimes(StoppingCriteria):
    """Records the time of every token and never stops generation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._synchronize()
        self.start = time.perf_counter()
        self.tokens: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._synchronize()
        self.tokens.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _reset_host_peak() -> bool:
    """Reset the peak of the resident set; return False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _host_peak_mib() -> float | None:
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:")), None)
