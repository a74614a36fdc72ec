"""Time and memory of the operations against the number of tokens: measurement, fitted exponents, plot.

An implementation is not run at sizes where the extrapolation of its smaller sizes exceeds ``--most-seconds`` or
`MOST_BYTES`; the table lists these. Exponents are least-squares fits in the logarithms over the sizes from
`FITTED_FROM` on, because fixed costs dominate below.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtc.bench._ops import OPS, Draw
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import CLOCKS, markdown_table, megabytes, repeated, seconds
from vtc.errors import ConfigError
from vtc.files import replacing

__all__ = ["SIZES", "exponent", "measure", "plot", "run", "table"]

SIZES = (256, 1024, 4096, 16384, 65536)
FITTED_FROM = 1024
MOST_BYTES = 4e9
FEW_SECONDS = 2.0  # longer runs are not repeated
LABELS = {"ours": "vtc", "baseline": "baseline"}

Points = dict[int, dict[str, float]]
"""Seconds and bytes by number of tokens."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the requested operations, print the table, plot if requested; return JSON-able results."""
    results = {}
    for name in args.op or OPS:
        results[name] = measure(name, args)
    print(table(results))
    print(
        f"\nMedian of {args.repeats} interleaved rounds, of one where it takes more than {FEW_SECONDS:g} s; exponents "
        f"fitted from {FITTED_FROM:,} tokens on. Not run: what would take more than {args.most_seconds:g} s or "
        f"{MOST_BYTES / 1e9:g} GB, by how it has grown so far."
    )
    if args.plot:
        plot(results, args.plot)
    return results


@torch.no_grad()
def measure(name: str, args: argparse.Namespace, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Measure both implementations of one operation; return JSON-able lists of points and of skipped sizes."""
    points: dict[str, Points] = {label: {} for label in LABELS}
    skipped: dict[str, dict[int, str]] = {label: {} for label in LABELS}
    for n in sizes:
        problem = OPS[name].at(
            Draw(torch.Generator().manual_seed(0), getattr(torch, args.dtype), args.device), n, growing=True
        )
        works = {"ours": problem.ours, "baseline": problem.baseline}
        for label in LABELS:
            reason = (
                _too_much(points[label], n, args.most_seconds) if not skipped[label] else "more than the size before"
            )
            if reason:
                skipped[label][n] = reason
                del works[label]
        found = _rounds(works, args)
        for label, work in works.items():
            points[label][n] = {"seconds": found[label], "bytes": peak_bytes(work, args.device)}
    return {
        "shape": OPS[name].shape(growing=True),
        **{
            label: {
                "n": list(points[label]),
                "seconds": [point["seconds"] for point in points[label].values()],
                "bytes": [point["bytes"] for point in points[label].values()],
                "not_run": {str(n): why for n, why in skipped[label].items()},
            }
            for label in LABELS
        },
    }


def _rounds(works: Mapping[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, float]:
    """Return median seconds of every implementation; quick ones are interleaved, the others run once."""
    clock = CLOCKS[args.clock]
    taken: dict[str, list[float]] = {}
    quick = {}
    for label, work in works.items():
        began = clock()
        work()
        taken[label] = [clock() - began]
        if taken[label][0] <= FEW_SECONDS:
            quick[label], taken[label] = repeated(work, args.device, clock), []
    for _ in range(args.repeats):
        for label, one in quick.items():
            taken[label].append(one()["run"])
    return {label: statistics.median(times) for label, times in taken.items()}


def _too_much(points: Points, n: int, most_seconds: float) -> str | None:
    """Return why `n` tokens should be skipped, extrapolating smaller sizes; None to run them."""
    if len(points) < 2:
        return None
    (before, earlier), (last, latest) = list(points.items())[-2:]
    for what, limit, words in (("seconds", most_seconds, seconds), ("bytes", MOST_BYTES, megabytes)):
        if not earlier[what] or not latest[what]:
            continue
        power = math.log(latest[what] / earlier[what]) / math.log(last / before)
        expected = latest[what] * (n / last) ** min(max(power, 1.0), 3.0)  # no operation is steeper, only noise
        if expected > limit:
            return f"about {words(expected)}"
    return None


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit p of the power law c * size^p to `values` by least squares of the logarithms; NaN for too few values."""
    if len(sizes) < 2 or min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def fitted(curve: Mapping[str, Any], what: str) -> float:
    """Fit the exponent of "seconds" or "bytes" of one implementation from `FITTED_FROM` tokens on."""
    pairs = [(n, value) for n, value in zip(curve["n"], curve[what], strict=True) if n >= FITTED_FROM]
    return exponent(*zip(*pairs, strict=True)) if len(pairs) >= 3 else math.nan


def table(results: Mapping[str, Any]) -> str:
    """Format one row per operation and implementation: figures at every size, exponents."""
    sizes = sorted({n for result in results.values() for label in LABELS for n in _all_sizes(result[label])})
    rows = []
    for name, result in results.items():
        shape = ", ".join(f"{key} {size}" for key, size in result["shape"].items())
        for label, words in LABELS.items():
            curve = result[label]
            at = {n: (s, b) for n, s, b in zip(curve["n"], curve["seconds"], curve["bytes"], strict=True)}
            cells = [
                f"{seconds(at[n][0])}, {megabytes(at[n][1])}" if n in at else f"not run: {curve['not_run'][str(n)]}"
                for n in sizes
            ]
            rows.append((name, shape, words, *cells, _power(fitted(curve, "seconds")), _power(fitted(curve, "bytes"))))
    return markdown_table(("operation", "shape", "code", *(f"N = {n:,}" for n in sizes), "time", "memory"), rows)


def _all_sizes(curve: Mapping[str, Any]) -> set[int]:
    return {*curve["n"], *map(int, curve["not_run"])}


def _power(value: float) -> str:
    return "-" if math.isnan(value) else f"N^{value:.2f}"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot one panel per operation: seconds on the left axis, bytes on the right, the baseline dashed.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError('--plot needs matplotlib: pip install "vtc[eval]".') from error
    columns = 4
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, result) in zip(panels, results.items(), strict=False):
        right = axes.twinx()
        for label, style in (("ours", "o-"), ("baseline", "x--")):
            curve = result[label]
            axes.plot(curve["n"], curve["seconds"], style, color="tab:blue", markersize=4)
            right.plot(curve["n"], [count / 1e6 for count in curve["bytes"]], style, color="tab:orange", markersize=4)
        axes.set(xscale="log", yscale="log", title=name)
        right.set(yscale="log")
        axes.set_xticks(SIZES, [f"{n:,}" for n in SIZES], rotation=30)
        axes.minorticks_off()
        axes.tick_params(axis="y", colors="tab:blue")
        right.tick_params(axis="y", colors="tab:orange")
        axes.grid(alpha=0.3)
    for axes in list(figure.axes[: rows * columns])[len(results) :]:
        axes.remove()
    figure.supxlabel("tokens")
    figure.suptitle("seconds (blue, left) and peak MB (orange, right); vtc solid, the baseline dashed", fontsize=11)
    with replacing(path) as file:
        figure.savefig(file, dpi=110)
