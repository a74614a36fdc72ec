"""Worst error of invariant 2 per family, as a Markdown table.

    python -m tests.invariants.measure_exactness --output exactness.md

The compressed model beside the untouched one with the dropped tokens masked: largest absolute difference of the
logits over all applicable methods of the invariant matrix and all batch kinds, at prefill (all tokens that are left)
and over the cached decode steps of a greedy generate(). What float32 allows stands beside it: how far the untouched
model's own logits are from those of the same weights in float64.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
import transformers

from tests import tiny
from tests.invariants.matrix import DROPPING, build
from tests.invariants.test_2_masking import DECODE_STEPS, HYBRID, decode_error, hybrid_error, prefill_error
from tests.reference import max_error

KINDS = ("single", "ragged", "two_images", "no_image_row")
COLUMNS = (("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.float64))


def worst(family: tiny.Family, attention: str, dtype: torch.dtype) -> tuple[float | None, float]:
    """Errors at prefill and over the decode steps; a linear-attention decoder has the second alone."""
    case = build(family, attention, dtype=dtype)
    methods = [method for method in DROPPING if method.applies_to(family)]
    batches = [case.batch(kind) for kind in KINDS]
    if family in HYBRID:
        return None, max(hybrid_error(case, method, inputs) for method in methods for inputs in batches)
    prefill = max(prefill_error(case, method, inputs)[0] for method in methods for inputs in batches)
    return prefill, max(decode_error(case, method, inputs) for method in methods for inputs in batches)


@torch.no_grad()
def own_rounding(family: tiny.Family) -> tuple[float, float]:
    """Largest logit of the untouched model, and how far its float32 logits are from its float64 ones."""
    single, double = build(family), build(family, dtype=torch.float64)
    largest, error = 0.0, 0.0
    for kind in KINDS:
        seen = single.batch(kind)["attention_mask"].bool()
        ours, exact = (case.model(**case.batch(kind)).logits[seen] for case in (single, double))
        largest = max(largest, float(exact.abs().max()))
        error = max(error, max_error(ours, exact))
    return largest, error


def table() -> str:
    """The table, conditions first."""
    names = [f"{attention} {str(dtype).removeprefix('torch.')}" for attention, dtype in COLUMNS]
    head = ["family", *(f"{name}, {part}" for name in names for part in ("prefill", "decode"))]
    head += ["largest logit", "untouched, float32 against float64"]
    lines = [
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, CPU, "
        f"{torch.get_num_threads()} thread(s). Tiny random-weight models. "
        f"Methods: {', '.join(map(str, DROPPING))}. Batches: {', '.join(KINDS)}. Decode: first token and "
        f"{DECODE_STEPS} cached steps.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- " * len(head) + "|",
    ]
    for family in tiny.FAMILIES:
        cells = [family.name]
        for attention, dtype in COLUMNS:
            cells += ["-" if error is None else f"{error:.1e}" for error in worst(family, attention, dtype)]
        largest, rounding = own_rounding(family)
        cells += [f"{largest:.1f}", f"{rounding:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
