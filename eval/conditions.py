"""The conditions of a measurement: command, versions, state of the checkout, hardware."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import vtc


def conditions(command: str | None = None, **config: Any) -> dict[str, Any]:
    """Return command, versions, state of the checkout and hardware, and the arguments as ``config``."""
    return {
        "command": command_line() if command is None else command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vtc": vtc.__version__,
        "git": _git_state(),
        **hardware(),
        **({"config": config} if config else {}),
    }


def command_line() -> str:
    """Return the command that started this process."""
    return shlex.join(["python", "-m", "eval", *sys.argv[1:]])


def hardware() -> dict[str, Any]:
    """Return the facts about the machine that times depend on."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git_state() -> str | None:
    """Return the commit, with a plus if files differ from it; None outside a checkout."""
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


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not on this system
        return None
