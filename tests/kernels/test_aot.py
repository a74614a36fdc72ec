"""Every Triton kernel compiles for A100 and H100, without spilling registers and within their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.kernels.interpreted import needs_triton
from vtc.kernels import aot, dispatch

pytestmark = needs_triton

# In a process of its own, and one for all: where Triton interprets, it cannot compile.
COMPILE = """
import dataclasses, json
from vtc.kernels import aot

found = {}
for spec in aot.kernels():
    for capability in aot.SHARED_MEMORY:
        found[f"{spec.name} for sm_{capability}"] = dataclasses.asdict(aot.compiled(spec, capability))
print(json.dumps(found))
"""


def test_kernels_fit_the_chips() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found
    for kernel, takes in found.items():
        limit = aot.SHARED_MEMORY[int(kernel[-2:])]
        assert takes["stack"] == 0, f"{kernel} spills registers: {takes}"
        assert 0 < takes["registers"] < 256, f"{kernel}: {takes}"
        assert takes["shared"] <= limit, f"{kernel} takes more than {limit} bytes of shared memory: {takes}"


def test_every_kernel_is_listed() -> None:
    # What is decorated in a module and takes part in a launch is listed, so that nothing escapes the test above.
    import importlib

    for module in map(importlib.import_module, aot.modules()):
        listed = {spec.kernel for spec in module.KERNELS}
        called = {name for spec in module.KERNELS for name in spec.kernel.fn.__code__.co_names}
        for name, item in vars(module).items():
            if type(item).__name__ in ("JITFunction", "InterpretedFunction"):
                assert item in listed or name in called, f"{module.__name__}.{name} is compiled by no test"


def test_every_triton_implementation_exists() -> None:
    for operation in dispatch.OPS.values():
        if operation.triton is not None:
            assert callable(operation.load_triton())
            assert operation.triton.partition(":")[0] in aot.modules()
