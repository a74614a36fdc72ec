"""Interleaved timing, and the conditions without which a time means nothing."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from vtc._version import package_version

Figures = dict[str, float]
"""Seconds by name, as one run measured them."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What to tell time by: the wall, or the processor time of this process, all its threads together."""

MIN_SECONDS = 0.02
"""How long a run of something short is made."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes
    ----------
    run : callable
        Does the work and returns the seconds of each of its parts.
    around : callable
        Context entered before and left after every run, outside the clock: compress and restore, for instance.
    """

    run: Callable[[], Figures]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one figure, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle measurement."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; both the single value if there is only one."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def to_dict(self) -> dict[str, Any]:
        """Median, quartiles and every measurement."""
        first, third = self.quartiles
        return {"median": self.median, "quartiles": [first, third], "seconds": list(self.seconds)}


@dataclass
class Stopwatch:
    """Adds up the seconds of named parts of one run, by the clock on the wall unless it is given another."""

    device: torch.device
    figures: Figures = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement, the device's queue included."""
        self._synchronize()
        start = self.clock()
        yield
        self._synchronize()
        self.figures[name] = self.figures.get(name, 0.0) + self.clock() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleave(cases: Mapping[str, Case], *, repeats: int, warmup: int = 1) -> dict[str, dict[str, Timing]]:
    """Run all cases in turn, again and again, so that a slow minute of the machine hits each of them alike.

    Parameters
    ----------
    cases : mapping of str to Case
    repeats : int
        Measured rounds, each in an order of its own, the same in every run: a case pays for what ran before it (caches,
        clock rates), so none may always follow the same other.
    warmup : int
        Rounds before them that are not measured.

    Returns
    -------
    dict of case name to dict of figure name to Timing
    """
    names = list(cases)
    rounds: dict[str, list[Figures]] = {name: [] for name in names}
    for number in range(-warmup, repeats):
        for name in random.Random(number).sample(names, len(names)):
            with cases[name].around():
                figures = cases[name].run()
            if number >= 0:
                rounds[name].append(figures)
    return {
        name: {figure: Timing(tuple(run[figure] for run in runs)) for figure in runs[0]}
        for name, runs in rounds.items()
    }


def repeated(work: Callable[[], Any], device: str, clock: Callable[[], float]) -> Callable[[], Figures]:
    """A run of `work` that is long enough for the clock, as seconds of one."""
    began = time.perf_counter()
    work()
    number = max(1, math.ceil(MIN_SECONDS / (time.perf_counter() - began)))
    return partial(_repeat, work, number, torch.device(device), clock)


def _repeat(work: Callable[[], Any], number: int, device: torch.device, clock: Callable[[], float]) -> Figures:
    watch = Stopwatch(device, clock=clock)
    with watch.part("run"):
        for _ in range(number):
            work()
    return {"run": watch.figures["run"] / number}


def add_timing_arguments(parser: argparse.ArgumentParser, *, repeats: int, warmup: int, dtype: str) -> None:
    """The options that every benchmark has, with its own defaults."""
    parser.add_argument("--repeats", type=int, default=repeats, help=f"measured rounds ({repeats})")
    parser.add_argument("--warmup", type=int, default=warmup, help=f"rounds before them ({warmup})")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=dtype, help=f"({dtype})")
    parser.add_argument("--device", default="cpu", help="(cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results and conditions there")


def conditions(**more: Any) -> dict[str, Any]:
    """What a reader needs to know about the machine and the run, as JSON types."""
    return {
        "command": " ".join(["vtc", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vtc": package_version(),
        },
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.system(),
        },
        **more,
    }


def _cpu_name() -> str:
    """The processor's marketing name where the system tells it, else the architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A padded markdown table: first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def joined(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [("-" * w) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([joined(header), joined(rule), *(joined(row) for row in rows)])


def seconds(value: float) -> str:
    """Three digits in the unit that suits them."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value * 1e6)} µs"


def spread(timing: Mapping[str, Any]) -> str:
    """Median and quartiles of `Timing.to_dict`."""
    low, high = timing["quartiles"]
    return f"{seconds(timing['median'])} [{seconds(low)}, {seconds(high)}]"


def megabytes(count: float) -> str:
    """Bytes in units of 10^6, three digits."""
    return f"{_digits(count / 1e6)} MB"


def _digits(value: float) -> str:
    """Three of them, and never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.4f}"


def describe(stated: Mapping[str, Any]) -> str:
    """`conditions` in one line, for under a table."""
    machine, versions = stated["machine"], stated["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} threads"
    return f"{where}; " + ", ".join(f"{name} {version}" for name, version in versions.items())


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result with its conditions, indented."""
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
