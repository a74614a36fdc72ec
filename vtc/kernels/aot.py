"""Ahead-of-time compilation of the Triton kernels, without a GPU.

Every ``triton_*.py`` lists typical specialisations of its kernels. `kernels` collects the lists; `compiled` runs the
compilers of Triton and NVIDIA, which come with Triton and need no GPU, and reads the resources that the result uses.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtc import kernels as package

__all__ = ["SHARED_MEMORY", "KernelSpec", "Resources", "compiled", "kernels", "modules"]

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Most bytes of shared memory of one block, by compute capability (A100 and H100)."""


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """One specialisation of a kernel, as it is launched.

    Attributes
    ----------
    kernel : JITFunction
    signature : mapping of str to str
        Triton type of every parameter that is not constant, such as "*bf16", "*fp32", "i32", "fp32".
    constants : mapping of str to value
        Values of the constant parameters.
    num_warps, num_stages : int
        Launch options.
    aligned : tuple of str
        Pointers and sizes divisible by 16, which Triton detects at a real launch; None: all pointers.
    label : str
        Description of the specialisation.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Name of the kernel with the label."""
        return f"{self.kernel.__name__}[{self.label}]" if self.label else str(self.kernel.__name__)


@dataclass(frozen=True)
class Resources:
    """Resources that a compiled kernel uses.

    Attributes
    ----------
    registers : int
        Registers per thread.
    stack : int
        Bytes of local memory per thread, for spilled registers.
    shared : int
        Bytes of shared memory per block.
    """

    registers: int
    stack: int
    shared: int


def modules() -> list[str]:
    """Return the names of the modules of this package that hold Triton kernels."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [f"{package.__name__}.{name}" for name in names if name.startswith("triton_")]


def kernels() -> list[KernelSpec]:
    """Return all specialisations that the `modules` list in their ``KERNELS``; imports Triton."""
    return [spec for name in modules() for spec in importlib.import_module(name).KERNELS]


def compiled(spec: KernelSpec, capability: int) -> Resources:
    """Compile a kernel for a compute capability (80, 90) and return the resources that it uses.

    Requires that Triton was imported without ``TRITON_INTERPRET``, as its own functions are not compilable otherwise.

    Raises
    ------
    RuntimeError
        The output of cuobjdump does not list the resources.
    """
    from triton import compile as build
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    signature = {name: "constexpr" if name in spec.constants else spec.signature[name] for name in names}
    aligned = spec.aligned
    if aligned is None:
        aligned = tuple(name for name, kind in spec.signature.items() if kind.startswith("*"))
    source = ASTSource(
        fn=spec.kernel,
        signature=signature,
        constexprs=dict(spec.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    built = build(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump does not list the resources of {spec.name}: {text!r}")
    return Resources(int(found[1]), int(found[2]), int(built.metadata.shared))
