"""The Markdown report of `vtc bench gpu`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtc.bench._gpu_parts import PARTS
from vtc.bench.timing import describe, markdown_table, megabytes, seconds

__all__ = ["report"]

Cases = Mapping[str, Mapping[str, Any]]
"""Entries of `vtc.bench._gpu.Results` by case."""


def report(machine: Mapping[str, Any], parts: Mapping[str, Cases]) -> str:
    """Return all tables that have a case, and what failed or was left out."""
    lines = [
        f"{describe(machine['conditions'])}.",
        f"Copies {machine['bytes_per_second'] / 1e9:,.0f} GB/s, bytes read and written; multiplies "
        f"{machine['flops'] / 1e12:,.3g} TFLOP/s in bfloat16.",
    ]
    if machine["memory_bytes"] is None:
        lines.append("**Tried without a GPU, at tiny sizes: no time here means anything.**")
    for name in PARTS:
        cases = parts.get(name, {})
        done = {case: entry["result"] for case, entry in cases.items() if entry["status"] == "done"}
        lines += [f"\n## {name}\n", _SUMMARIES[name], ""]
        if done:
            lines.append(_TABLES[name](done))
        for status, heading in (("failed", "Failed"), ("left out", "Left out")):
            these = [(case, entry["error"]) for case, entry in cases.items() if entry["status"] == status]
            lines += [f"\n{heading}:\n"] if these else []
            lines += [f"- {case}: {_last_line(error)}" for case, error in these]
    return "\n".join(lines) + "\n"


def _last_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return f"`{lines[-1][:300]}`" if lines else "no message"


def _kernels(done: Mapping[str, Any]) -> str:
    columns = [f"{dtype}, {size}" for size in ("small", "true") for dtype in ("float32", "bfloat16", "float16")]
    names = list(dict.fromkeys(case.split(", ")[0] for case in done))
    rows = []
    for name in names:
        found = [done.get(f"{name}, {column}") for column in columns]
        rows.append((name, *("" if one is None else _agreement(one) for one in found)))
    return markdown_table(("operation", *columns), rows)


def _agreement(result: Mapping[str, Any]) -> str:
    error = result["error"]
    return f"{'' if result['holds'] else '**WRONG** '}{'inf' if error is None else f'{error:.0e}'}"


def _laws(done: Mapping[str, Any]) -> str:
    rows = []
    for case, result in done.items():
        if "skipped" in result:
            rows.append((case, "not installed", result["skipped"]))
            continue
        broken = [law for law in result["laws"] if not law["holds"]]
        telling = broken or [law for law in result["laws"] if law["measured"] != "identical"]
        said = "; ".join(f"{law['law']}: {law['measured']}" for law in telling)
        count = f"{len(result['laws']) - len(broken)} of {len(result['laws'])}"
        rows.append((case, count if not broken else f"**{count}**", said))
    return markdown_table(("model", "hold", "measured"), rows)


def _models(done: Mapping[str, Any]) -> str:
    header = (
        "shape", "keep", "tokens", "preprocess", "tower", "select", "prefill", "TTFT", "speed-up", "prefill alone",
        "by tokens", "realised share", "of a prompt as long", "decode", "cache", "peak of the prefill",
    )  # fmt: skip
    rows = [
        (
            case,
            f"{100 * row['keep']:.0f} %",
            f"{row['tokens_before']} → {row['tokens_after']}",
            "-" if row["preprocess"] is None else seconds(row["preprocess"]),
            seconds(row["tower"]),
            seconds(row["select"]) if row["select"] else "-",
            seconds(row["prefill"]),
            seconds(row["ttft"]),
            f"{row['ttft_speed_up']:.2f}x",
            f"{row['prefill_speed_up']:.2f}x",
            f"{row['by_tokens']:.2f}x",
            f"{row['realised_share']:.2f}",
            f"{row['share_of_plain']:.2f}",
            f"{row['tokens_per_second']:.1f}/s",
            megabytes(row["cache_bytes"]),
            megabytes(row["peak_bytes"]),
        )
        for case, result in done.items()
        for row in result["settings"]
    ]
    return markdown_table(header, rows)


def _times(done: Mapping[str, Any]) -> str:
    rows = []
    for name in dict.fromkeys(case.split(", ")[0] for case in done):
        own = done.get(f"{name}, kernel")
        found = (done.get(f"{name}, {how}") or {} for how in ("kernel", "graph", "compiled"))
        times = {label: time for result in found for label, time in result.get("times", {}).items()}
        others = [time for label, time in times.items() if label not in ("triton", "launches")]
        best = f"{min(others) / times['triton']:.2f}x" if others and "triton" in times else ""
        limit = own["limit"] if own else None
        rows.append(
            (
                name,
                *(seconds(times[label]) if label in times else "-" for label in _LABELS),
                seconds(limit) if limit else "-",
                f"{100 * limit / times['triton']:.0f} %" if limit and "triton" in times else "-",
                best,
            )
        )
    return markdown_table(("operation", *_LABELS.values(), "limit", "of the limit", "against the best other"), rows)


_LABELS = {
    "triton": "kernel",
    "launches": "without a graph",
    "torch": "vtc in PyTorch",
    "baseline": "baseline",
    "compiled": "baseline, compiled",
}

_TABLES = {"kernels": _kernels, "laws": _laws, "models": _models, "times": _times}

_SUMMARIES: dict[str, str] = {
    "kernels": "Every kernel against its specification: the largest difference relative to the largest value, and of "
    "picks by how much one is worth less than the best, as a share of what rounding allows.",
    "laws": "Compression of tiny models with random weights against the untouched model.",
    "models": "Random bfloat16 weights, all layers; medians of interleaved runs, `vtc` before the decoder. TTFT is "
    "preprocessing, where PIL and torchvision are installed, and a prefill with tower and selection. The realised "
    "share is the speed-up of the prefill without its tower, divided by that of the number of tokens; beside it the "
    "time of a text prompt of the packed length, divided by that of the compressed prefill without its tower.",
    "times": "bfloat16, true shapes. The limit is the time in which the inputs and the result pass the memory once at "
    "the speed of the copy above. Greedy picks are launches recorded as one; without a graph each comes from the host.",
}
