"""Interleaved timing, the conditions of a measurement, and tables of results.

Imports torch and transformers only when it measures, so that the command line can list the options without them.
"""

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
from typing import TYPE_CHECKING, Any

from vtc._version import package_version
from vtc.budget import check_budget
from vtc.errors import ConfigError
from vtc.files import check_writable, write_text
from vtc.limits import MAX_NEW_TOKENS, MAX_ROUNDS, check_count
from vtc.registry import get_selector

if TYPE_CHECKING:
    import torch

Figures = dict[str, float]
"""Seconds of one run by name of the figure."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Wall-clock time, or processor time of this process, summed over its threads."""

_SIZES = {
    "repeats": (1, MAX_ROUNDS),
    "warmup": (0, MAX_ROUNDS),
    "layers": (1, 128),
    "visual_tokens": (1, 100_000),
    "text_tokens": (1, 100_000),
    "steps": (1, MAX_NEW_TOKENS),
    "batch": (1, 4096),
}
"""Least and most of the sizes that benchmarks have, by the names of their arguments."""

_DAY = 86_400

_MIN_SECONDS = 0.02
"""Length to which the runs of short work are extended by repetition."""


@dataclass(frozen=True)
class Case:
    """One piece of work to time.

    Attributes
    ----------
    run : callable
        Does the work and returns the seconds of its parts.
    around : callable
        Returns a context for every run, entered and left outside of the measured time, such as `vtc.compressed`.
    """

    run: Callable[[], Figures]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one figure, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile in seconds; the value itself for a single measurement."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def to_dict(self) -> dict[str, Any]:
        """Return median, quartiles and all measurements as JSON types."""
        first, third = self.quartiles
        return {"median": self.median, "quartiles": [first, third], "seconds": list(self.seconds)}


@dataclass
class Stopwatch:
    """Sums the seconds of named parts of one run, in wall-clock time by default."""

    device: torch.device
    figures: Figures = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement, including the work queued on the device."""
        self._synchronize()
        start = self.clock()
        yield
        self._synchronize()
        self.figures[name] = self.figures.get(name, 0.0) + self.clock() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)


def interleave(cases: Mapping[str, Case], *, repeats: int, warmup: int = 1) -> dict[str, dict[str, Timing]]:
    """Run all cases in turn, round by round, so that fluctuations of the machine affect them equally.

    Parameters
    ----------
    cases : mapping of str to Case
    repeats : int
        Number of measured rounds. Every round has a different, seeded order: a case is affected by the one before it
        (caches, clock rates), so none may always follow the same other.
    warmup : int
        Number of preceding rounds that are not measured.

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
    """Return a run for a `Case` that repeats `work` to be long enough for the clock; its figure is per repetition."""
    once = _repeat(work, 1, device, time.perf_counter)["run"]  # until the device is done, not until it was told
    number = max(1, math.ceil(_MIN_SECONDS / once))
    return partial(_repeat, work, number, device, clock)


def _repeat(work: Callable[[], Any], number: int, device: str, clock: Callable[[], float]) -> Figures:
    import torch

    watch = Stopwatch(torch.device(device), clock=clock)
    with watch.part("run"):
        for _ in range(number):
            work()
    return {"run": watch.figures["run"] / number}


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses one of `CLOCKS`."""
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, for a machine that is shared; with one thread it equals the wall time (wall)",
    )


def add_timing_arguments(parser: argparse.ArgumentParser, *, repeats: int, warmup: int, dtype: str) -> None:
    """Add the options that all benchmarks share, with the defaults of one."""
    parser.add_argument("--repeats", type=int, default=repeats, help=f"measured rounds ({repeats})")
    parser.add_argument("--warmup", type=int, default=warmup, help=f"rounds before them ({warmup})")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=dtype, help=f"({dtype})")
    parser.add_argument("--device", default="cpu", help="(cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results and conditions there")


def check_arguments(args: argparse.Namespace, *outputs: Path | None) -> None:
    """Refuse, before a model is built, what measures nothing or never ends, and files that cannot be written later.

    Parameters
    ----------
    args : Namespace
        Arguments of a benchmark, --json among them.
    outputs : Path or None
        Further files that it writes.

    Raises
    ------
    ConfigError
        A size, a fraction or a number of seconds is out of its range, which the message names; there is no such method;
        the clock does not see the device; or the device does not exist.
    InputError
        A file cannot be written.
    """
    for name, (least, most) in _SIZES.items():
        for value in _given(args, name):
            check_count(f"--{name.replace('_', '-')}", value, most, least=least)
    for ratio in _given(args, "keep_ratio"):
        check_budget(ratio, None)
    for seconds in _given(args, "most_seconds"):
        if not 0 < seconds <= _DAY:
            raise ConfigError(f"--most-seconds must be positive and at most {_DAY:,}, a day, got {seconds}.")
    for method in _given(args, "method"):
        get_selector(method)
    if getattr(args, "clock", "wall") == "cpu" and args.device.partition(":")[0] != "cpu":
        raise ConfigError(f"--clock cpu does not see what runs on {args.device}; use --clock wall.")
    check_device(args.device)
    check_writable(*(path for path in (args.json, *outputs) if path is not None))


def _given(args: argparse.Namespace, name: str) -> list[Any]:
    """The values of an argument that a command may not have, or may not have been given."""
    value = getattr(args, name, None)
    return value if isinstance(value, list) else [] if value is None else [value]


def check_device(device: str) -> None:
    """Refuse a torch device on which nothing can be computed here.

    Raises
    ------
    ConfigError
        It does not exist, or is no device.
    """
    import torch

    try:
        if torch.device(device).type == "meta":
            raise ConfigError("--device meta: tensors there have no values, so nothing can be computed; use cpu.")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"--device {device}: {reason}") from error


def conditions(**more: Any) -> dict[str, Any]:
    """Return versions, machine and the given facts about the run as JSON types."""
    import torch
    import transformers

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
    """Return the model name of the processor where /proc lists it, else the architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a padded markdown table: first column left-aligned, the others right-aligned."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def joined(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [("-" * w) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([joined(header), joined(rule), *(joined(row) for row in rows)])


def seconds(value: float) -> str:
    """Format seconds with three digits in a suitable unit."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value * 1e6)} µs"


def spread(timing: Mapping[str, Any]) -> str:
    """Format median and quartiles of `Timing.to_dict`."""
    low, high = timing["quartiles"]
    return f"{seconds(timing['median'])} [{seconds(low)}, {seconds(high)}]"


def megabytes(count: float) -> str:
    """Format bytes in units of 10^6 with three digits."""
    return f"{_digits(count / 1e6)} MB"


def _digits(value: float) -> str:
    """Format with three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.4f}"


def describe(stated: Mapping[str, Any]) -> str:
    """Format `conditions` in one line, for the caption of a table."""
    machine, versions = stated["machine"], stated["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} threads"
    return f"{where}; " + ", ".join(f"{name} {version}" for name, version in versions.items())


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result with its conditions as indented JSON, in full or not at all."""
    write_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
