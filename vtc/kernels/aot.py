"""What compilers make of the Triton kernels for chips that need not be there.

Every ``triton_*.py`` lists its kernels with one typical specialisation each; `kernels` collects the lists, `compiled`
runs Triton's and NVIDIA's compilers, which come with Triton and need no GPU, and reads the result's resources.
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

__all__ = ["SHARED_MEMORY", "Binary", "KernelSpec", "compiled", "kernels", "modules"]

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one block can have, by compute capability: A100 and H100."""


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """One kernel as it is launched.

    Attributes
    ----------
    kernel : JITFunction
    signature : mapping of str to str
        Triton's type of every parameter that is no constant, such as "*bf16", "*fp32", "i32", "fp32".
    constants : mapping of str to value
        The other parameters.
    num_warps, num_stages : int
        As launched.
    aligned : tuple of str
        Pointers and sizes that are multiples of 16, as Triton finds out itself at a real launch; None: all pointers.
    label : str
        What this specialisation is, beside the kernel's name.
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
        """The kernel's name and what this specialisation is."""
        return f"{self.kernel.__name__}[{self.label}]" if self.label else str(self.kernel.__name__)


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel takes of a chip.

    Attributes
    ----------
    registers : int
        Per thread.
    stack : int
        Bytes of local memory per thread: where registers are spilled to.
    shared : int
        Bytes per block.
    """

    registers: int
    stack: int
    shared: int


def modules() -> list[str]:
    """Names of the modules of this package that hold Triton kernels."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [f"{package.__name__}.{name}" for name in names if name.startswith("triton_")]


def kernels() -> list[KernelSpec]:
    """Every kernel that the `modules` list in their ``KERNELS``; imports Triton."""
    return [spec for name in modules() for spec in importlib.import_module(name).KERNELS]


def compiled(spec: KernelSpec, capability: int) -> Binary:
    """Compile a kernel for a compute capability (80, 90) and read what it takes.

    Not where Triton interprets: its own functions must be compilable, so ``TRITON_INTERPRET`` is unset.
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
        raise RuntimeError(f"cuobjdump says nothing of {spec.name}: {text!r}")
    return Binary(int(found[1]), int(found[2]), int(built.metadata.shared))
