"""Cases of a benchmark that do what kernels do on a bad day, for the tests of what runs them."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


def measure(case: str, device: str, small: bool) -> dict[str, Any]:
    """Measure, raise, take the process along, or never end."""
    if case == "raises":
        raise ValueError("a wrong number")
    if case == "dies":
        print("last words", file=sys.stderr, flush=True)
        os.abort()
    if case == "is infinite":
        return {"error": float("inf")}
    if case == "hangs":
        time.sleep(600)
    return {"device": device, "small": small, "process": os.getpid()}
