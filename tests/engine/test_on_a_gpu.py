"""Runs `on_a_gpu.py` in a process of its own: what transformers 5.18 notes of a pretended GPU stays noted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_calls_on_a_gpu() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("on_a_gpu.py")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "11 passed" in done.stdout, done.stdout
