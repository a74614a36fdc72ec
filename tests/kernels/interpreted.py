"""What tests of Triton kernels share: the device they run on, and the marker for where Triton is not installed.

On a CPU kernels run in Triton's interpreter (see conftest.py), on a GPU as compiled.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

few = settings(max_examples=12, deadline=None, derandomize=True)
"""The interpreter takes tens of milliseconds per block of a kernel."""
