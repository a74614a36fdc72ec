"""Roofline estimate of the Triton kernels on two GPUs, from bytes and operations; nothing is run.

The memory bandwidth and the arithmetic throughput bound the time of a kernel from below. "At best" counts every input
and output once, as if all repeated loads hit a cache; "without caches" counts every load of the kernels. The real time
lies between them, plus a few microseconds per launch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

from vtc.bench._models import LLAVA_7B
from vtc.bench._ops import OPS, Draw
from vtc.bench._traffic import Traffic, record
from vtc.bench.timing import markdown_table, seconds
from vtc.errors import KernelError
from vtc.kernels import aot, dispatch
from vtc.report.flops import DecoderShape

__all__ = ["CHIPS", "notes", "report", "resources_notes", "resources_table", "roofline_table", "work"]

TOKENS = 2880
"""Tokens of the prefill to compare with: five images of LLaVA."""


@dataclass(frozen=True)
class Chip:
    """Peak rates of a GPU: bytes per second, operations per second in bfloat16 products and otherwise."""

    name: str
    memory: float
    products: float
    other: float

    def time(self, moved: float, products: float, other: float) -> float:
        """Return the seconds of the slowest of the three, which run concurrently."""
        return max(moved / self.memory, products / self.products, other / self.other)


CHIPS = (
    Chip("A100", 1555e9, 312e12, 19.5e12),
    Chip("H100", 3350e9, 989e12, 67e12),
)
"""A100 with 40 GB (the one with 80 GB has 2,039 GB/s) and H100 SXM, by their data sheets, without sparsity."""


@torch.no_grad()
def work(name: str) -> tuple[Traffic, int, int]:
    """Return traffic, necessary bytes and number of launches of one operation of the benchmark, in bfloat16.

    An operation without kernels has no launches.
    """
    problem = OPS[name].at(Draw(torch.Generator().manual_seed(0), torch.bfloat16))
    try:
        with record() as launches:
            result = problem.ours()
    except KernelError:
        return Traffic(), 0, 0
    tensors = [leaf for leaf in tree_leaves((problem.reads, result)) if isinstance(leaf, torch.Tensor)]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return sum((launch.traffic for launch in launches), Traffic()), needed, len(launches)


def report() -> str:
    """Format both tables with their captions, as in docs/kernels.md.

    Raises
    ------
    KernelError
        Triton is not installed, or runs its interpreter.
    """
    if importlib.util.find_spec("triton") is None:
        raise KernelError("--roofline reads the Triton kernels, and Triton is not installed: pip install triton.")
    if dispatch.interpreting():
        raise KernelError(
            "--roofline compiles the kernels, which Triton cannot where it interprets: unset TRITON_INTERPRET."
        )
    return f"{roofline_table()}\n\n{notes()}\n\n{resources_table()}\n\n{resources_notes()}"


def notes() -> str:
    """Return the caption of the first table: rates of the GPUs and the prefill to compare with."""
    prefill = ", ".join(f"{seconds(prefill_seconds(chip))} on the {chip.name}" for chip in CHIPS)
    rates = "; ".join(
        f"{chip.name}: {chip.memory / 1e9:,.0f} GB/s, {chip.products / 1e12:.0f} TFLOP/s in products of bfloat16, "
        f"{chip.other / 1e12:g} otherwise"
        for chip in CHIPS
    )
    return (
        f"Batch 1, bfloat16, the launches of one call. {rates} (data sheets; the A100 with 80 GB moves 2,039 GB/s). "
        f"The prefill is that of LLaVA-1.5-7B's decoder at {TOKENS} tokens by the formula of `vtc/report/flops.py`, "
        f"nothing but its products at the full rate: {prefill}."
    )


def resources_notes() -> str:
    """Return the caption of the second table: the version of Triton."""
    version = importlib.metadata.version("triton")
    return f"As compiled by Triton {version}. Spilled: bytes of local memory per thread."


def prefill_seconds(chip: Chip) -> float:
    """Return the time of a 7B prefill of `TOKENS` tokens whose products run at the peak rate of the chip."""
    shape = DecoderShape.from_config(LLAVA_7B.config(LLAVA_7B.full_depth).get_text_config())
    return shape.prefill_flops(TOKENS) / chip.products


def roofline_table() -> str:
    """Format one row per operation with kernels: per chip two times, and the longer one as share of a prefill."""
    header = ["operation", "shape", "launches", "must move", "kernels move", "products", "other"]
    for chip in CHIPS:
        header += [f"{chip.name}: at best", "without caches", "of prefill"]
    rows = []
    for name, op in OPS.items():
        done, needed, launches = work(name)
        if not launches or name.endswith("/noise"):  # the values of the inputs make no difference
            continue
        row = [name, op.words(), f"{launches}", _bytes(needed), _bytes(done.moved)]
        row += [_operations(done.products), _operations(done.other)]
        for chip in CHIPS:
            best, worst = (chip.time(moved, done.products, done.other) for moved in (needed, done.moved))
            row += [seconds(best), seconds(worst), f"{100 * worst / prefill_seconds(chip):.3f} %"]
        rows.append(row)
    return markdown_table(header, rows)


def resources_table() -> str:
    """Compile every kernel for compute capabilities 8.0 and 9.0; format registers, shared memory and spills."""
    header = ["kernel"]
    for capability in aot.SHARED_MEMORY:
        header += [f"sm_{capability}: registers", "shared memory", "spilled"]
    rows = []
    for spec in aot.kernels():
        rows.append(resources_row(spec.name, [aot.compiled(spec, capability) for capability in aot.SHARED_MEMORY]))
    return markdown_table(header, rows)


def resources_row(name: str, binaries: Sequence[aot.Resources]) -> list[str]:
    """Format the resources of one kernel."""
    row = [name]
    for binary in binaries:
        row += [f"{binary.registers}", f"{binary.shared / 1024:.1f} KiB", f"{binary.stack} B"]
    return row


def _bytes(count: float) -> str:
    return _scaled(count, "B")


def _operations(count: float) -> str:
    return _scaled(count, "FLOP") if count else "-"


def _scaled(count: float, unit: str) -> str:
    power = min(4, int(math.log10(count)) // 3)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}{unit}"
