"""A process that measures cases of one part of `vtc bench gpu`, one after the other.

    python -m vtc.bench._gpu_worker MODULE EVENTS DEVICE CASE...

It appends a line of JSON to EVENTS when a case begins and when it ends, so that whoever reads along knows which case
has killed it. A case that leaves the device unusable, as an illegal memory access does, is the last: what follows would
fail for its sake.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

__all__ = ["main"]

UNUSABLE = 75
"""Exit status after a case that left the device unusable."""


def main(module: str, events: Path, device: str, cases: list[str]) -> int:
    """Measure the cases and return the exit status."""

    def tell(**event: Any) -> None:
        with events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    device = _resolved(device)
    small = not device.startswith("cuda")
    if small:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    tell(event="ready", device=device, small=small)
    measuring: Any = importlib.import_module(module)
    for case in cases:
        tell(event="begin", case=case)
        began = time.perf_counter()
        try:
            result = measuring.measure(case, device, small)
            json.dumps(result, allow_nan=False)  # a result that is not finite, or cannot be written, is none
            told = {"status": "done", "result": result}
        except Exception as error:  # whatever a kernel, a compiler or a model raises: the next case goes on
            told = {"status": "failed", "error": _described(error)}
        tell(event="end", case=case, seconds=time.perf_counter() - began, **told)
        if told["status"] == "failed" and not small and not _usable(device):
            return UNUSABLE
    return 0


def _resolved(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _usable(device: str) -> bool:
    import torch

    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).sum().item()
    except Exception:  # the error of an earlier launch comes back at every call
        return False
    return True


def _described(error: BaseException) -> str:
    """The last frames and the message, the way a person would quote them."""
    return "".join(traceback.format_exception(error)[-3:]).strip()[-2000:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
