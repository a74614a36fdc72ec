"""How long a setting takes and how much memory it needs, beside the uncompressed model in the same minutes."""

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
from eval import models
from eval.cells import BLIND, BOUNDS, FULL, Cell
from eval.journal import Journal, Row
from eval.models import Loaded
from eval.tasks.base import Media, Sample

DECODE_TOKENS = 16

FIGURES = ("speed_up", "ttft", "decode_rate", "selector_ms", "host_mib", "device_mib")
"""What one measurement holds: the ratio of all tokens' time to the first token in the same round to its own; that time
in seconds, vision tower included; tokens a second after it; milliseconds spent choosing; peaks of memory."""


def measure(
    loaded: Loaded,
    samples: Iterable[Sample],
    cells: Sequence[Cell],
    journal: Journal,
    *,
    count: int = 6,
    rounds: int = 3,
    seed: int = 0,
    decode_tokens: int = DECODE_TOKENS,
    progress: bool = True,
) -> None:
    """Time every cell on one sample at a time; what the journal holds already is passed over.

    Every round goes through all cells of a sample in an order of its own, after one round that does not count, so that
    a slow minute of the machine hits each alike. A round that was interrupted is made again as a whole.

    Parameters
    ----------
    loaded : Loaded
    samples : iterable of Sample
        The first `count` that can be read are timed.
    cells : sequence of Cell
        Those that nobody could use are left out: the ones that know the truth, and the blind one.
    journal : Journal
    count, rounds, seed, decode_tokens : int
    progress : bool
    """
    cells = [cell for cell in cells if cell.method not in BOUNDS and cell != BLIND]
    readable = islice(_readable(samples), count)
    with tqdm(total=count * rounds, unit="round", disable=not progress, dynamic_ncols=True) as bar:
        for order, (sample, media) in enumerate(readable):
            wanted = [n for n in range(rounds) if not all(journal.has(c.name, f"{sample.id}#{n}") for c in cells)]
            bar.update(rounds - len(wanted))
            encoded = models.inputs(loaded, [sample], [media]) if wanted else None
            for number in (-1, *wanted) if wanted else ():
                taken = {
                    cell.name: one(loaded.model, encoded, cell.config(seed=seed), decode_tokens)
                    for cell in random.Random(number).sample(cells, len(cells))
                }
                for cell in cells if number >= 0 else ():
                    paired = {"speed_up": taken[FULL.name]["ttft"] / taken[cell.name]["ttft"]}
                    place = {"cell": cell.name, "sample": f"{sample.id}#{number}", "order": order}
                    journal.add({**place, **taken[cell.name], **paired})
                bar.update(int(number >= 0))


def _readable(samples: Iterable[Sample]) -> Iterator[tuple[Sample, Media]]:
    for sample in samples:
        try:
            yield sample, sample.open()
        except vtc.InputError:  # its row says so already
            continue


def summary(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Medians of every figure by cell."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        figures = found.setdefault(row["cell"], {name: [] for name in FIGURES})
        for name in FIGURES:
            if row[name] is not None:
                figures[name].append(row[name])
    return {
        cell: {name: statistics.median(values) for name, values in figures.items() if values}
        for cell, figures in found.items()
    }


@torch.inference_mode()
def one(
    model: Any, encoded: Mapping[str, Any], config: vtc.CompressionConfig | None, decode_tokens: int
) -> dict[str, float | None]:
    """One answer of a fixed length, timed; the model is left uncompressed.

    Parameters
    ----------
    model : PreTrainedModel
    encoded : mapping
        Inputs of one row.
    config : CompressionConfig or None
        None times all tokens.
    decode_tokens : int
        Length of the answer, at least 2.
    """
    if config is not None:
        vtc.compress(model, config)
    try:
        on_cuda = model.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        host_known = _reset_host_peak()
        watch = _Marks(model.device)
        model.generate(
            **encoded,
            do_sample=False,
            min_new_tokens=decode_tokens,
            max_new_tokens=decode_tokens,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        host = _host_peak_mib() if host_known else None
        device = torch.cuda.max_memory_allocated(model.device) / 2**20 if on_cuda else None
        selector_ms = vtc.report(model).selector_ms if config is not None else 0.0
    finally:
        vtc.restore(model)
    decoding = watch.marks[-1] - watch.marks[0]
    return {
        "ttft": watch.marks[0] - watch.began,
        "decode_rate": (len(watch.marks) - 1) / decoding if decoding > 0 else None,
        "selector_ms": selector_ms,
        "host_mib": host,
        "device_mib": device,
    }


class _Marks(StoppingCriteria):
    """Never stops anything; notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._wait()
        self.began = time.perf_counter()
        self.marks: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._wait()
        self.marks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _reset_host_peak() -> bool:
    """Start the high-water mark of the resident set anew; False where the system cannot (it is then not told)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _host_peak_mib() -> float | None:
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:")), None)
