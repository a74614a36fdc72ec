"""The parts of `vtc bench gpu`: which cases there are, and which module measures them.

Such a module has a function `measure(case, device, small)` that returns a result of JSON types. It is imported only in
the process that measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtc.bench.kernels import OPERATIONS

__all__ = ["MACHINE", "PARTS", "Part"]

_KERNELS = tuple(name for name in OPERATIONS if name != "coverage_greedy")  # which is PyTorch everywhere
_GREEDY = {name for name in _KERNELS if "point" in name or name in ("max_sum", "dpp_greedy")}
"""Their baselines read a value at every pick, with which a compiler can spend its time in vain: they come last."""
_GRAPHS = (*sorted(_GREEDY), "coverage_greedy")  # whose launches are recorded as one
_DTYPES = ("float32", "bfloat16", "float16")
_FAMILIES = ("llava-1.5-7b", "llava-onevision-7b", "internvl3-8b", "qwen2.5-vl-7b", "qwen3-vl-4b")
_ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
_SHAPES = ("llava-1.5-7b", "qwen2.5-vl-7b", "internvl3-8b")
_BATCHES = (1, 8)


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes
    ----------
    module : str
        Measures its cases.
    cases : tuple of str
        On a GPU.
    limit : float
        Most seconds of one case.
    share : float
        Of the time that is left when the part begins, relative to the shares of the parts behind it.
    large : str
        Cases whose names contain this are left out where there is no GPU.
    processes : int
        How many measure side by side on a GPU: several where nothing is timed, as most of the time goes into compiling.
    """

    module: str
    cases: tuple[str, ...]
    limit: float
    share: float
    large: str | None = None
    processes: int = 1

    def of(self, small: bool) -> tuple[str, ...]:
        """Return the cases to run, on a GPU or `small`."""
        return tuple(case for case in self.cases if not (small and self.large and self.large in case))


MACHINE = Part("vtc.bench._gpu_machine", ("machine",), limit=180.0, share=0.0)
"""What everything is measured on; runs first."""

PARTS = {
    "kernels": Part(
        "vtc.bench._gpu_kernels",
        tuple(f"{name}, {dtype}, {size}" for size in ("small", "true") for name in _KERNELS for dtype in _DTYPES),
        limit=60.0,
        share=0.27,
        large="true",
        processes=4,
    ),
    "laws": Part(
        "vtc.bench._gpu_laws",
        tuple(f"{family}, {how}" for how in (*_ATTENTIONS, "static cache") for family in _FAMILIES),
        limit=90.0,
        share=0.2,
        processes=3,
    ),
    "models": Part(
        "vtc.bench._gpu_models",
        tuple(f"{shape}, batch {rows}" for shape in _SHAPES for rows in _BATCHES),
        limit=120.0,
        share=0.3,
    ),
    "times": Part(
        "vtc.bench._gpu_times",
        tuple(
            f"{name}, {how}"
            for how, names in (
                ("kernel", sorted(_KERNELS, key=_GREEDY.__contains__)),
                ("graph", _GRAPHS),
                ("compiled", sorted(_KERNELS, key=_GREEDY.__contains__)),
            )
            for name in names
        ),
        limit=40.0,
        share=0.23,
    ),
}
"""In the order in which they run."""
