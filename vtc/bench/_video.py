"""Peak memory of selecting among the tokens of a long video, measured in one process per method.

    python -m vtc.bench._video METHOD WIDTH CLOCK

runs one of these processes; Linux records its peak in /proc.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from vtc.bench.timing import CLOCKS, markdown_table, megabytes, seconds
from vtc.errors import ConfigError

__all__ = ["measure", "run", "table"]

METHODS = ("evs", "vidcom2", "divprune", "uniform", "random")
GRID = (500, 10, 20)  # frames, rows, columns: 100,000 tokens
KEEP = 2048
WIDTHS = (896, 3584)
"""Widths of LLaVA-OneVision with decoders of 0.5B and 7B parameters."""


def run(clock: str) -> list[dict[str, Any]]:
    """Measure every method at every width and print the table; `clock` is one of `CLOCKS`."""
    rows = []
    for width in WIDTHS:
        for method in METHODS:
            command = [sys.executable, "-m", __name__, method, str(width), clock]
            made = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(made.stdout.splitlines()[-1]))
    print(table(rows))
    print(
        f"\n{KEEP:,} of {math.prod(GRID):,} tokens ({GRID[0]} frames of {GRID[1]} x {GRID[2]}) in bfloat16, a process "
        "each. Peaks are the largest resident sets; before: Python, PyTorch and the features."
    )
    return rows


def measure(
    method: str, width: int, clock: str = "wall", grid: tuple[int, int, int] = GRID, keep: int = KEEP
) -> dict[str, Any]:
    """Measure one selection in this process.

    Raises
    ------
    ConfigError
        /proc does not contain the peak of the process.
    """
    import torch

    import vtc

    generator = torch.Generator().manual_seed(0)
    frames, height, columns = grid
    features = torch.empty(math.prod(grid), width, dtype=torch.bfloat16)
    still = torch.randn(height * columns, width, generator=generator)
    for number, frame in enumerate(features.view(frames, -1, width)):
        # A new scene every ten frames, small differences within a scene.
        still = torch.randn(still.shape, generator=generator) if number % 10 == 0 else still
        frame.copy_(still + 0.1 * torch.randn(still.shape, generator=generator))
    before = peak_resident_bytes()
    began = CLOCKS[clock]()
    selection = vtc.select(method, features=features, grid_thw=grid, keep_tokens=keep)
    taken = CLOCKS[clock]() - began
    return {
        "method": method,
        "width": width,
        "kept": selection.k,
        "features_bytes": features.numel() * features.element_size(),
        "before_bytes": before,
        "peak_bytes": peak_resident_bytes(),
        "seconds": taken,
    }


def peak_resident_bytes() -> int:
    """Return the peak of the resident set of this process.

    `resource.getrusage` is unsuitable, because a new process inherits the peak of its parent.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    if found is None:
        raise ConfigError("vtc bench kernels --video reads peaks of memory from /proc/self/status, which is missing.")
    return 1024 * int(found[1])


def table(rows: list[dict[str, Any]]) -> str:
    """Format results as a markdown table; the last column is the target."""
    return markdown_table(
        ("method", "width", "kept", "features", "peak before", "peak", "added by selecting", "seconds", "added < 1 GB"),
        [
            (
                r["method"],
                f"{r['width']}",
                f"{r['kept']:,}",
                megabytes(r["features_bytes"]),
                megabytes(r["before_bytes"]),
                megabytes(r["peak_bytes"]),
                megabytes(r["peak_bytes"] - r["before_bytes"]),
                seconds(r["seconds"]),
                "met" if r["peak_bytes"] - r["before_bytes"] < 1e9 else "missed",
            )
            for r in rows
        ],
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
