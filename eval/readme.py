"""Writes README's table and picture from the committed results, so that they cannot differ."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

import vtc
from eval import plots, tables
from eval.runs import BASELINES, BLIND, BOUNDS, FULL
from vtc.files import write_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "README.md"
RESULTS = ROOT / "eval" / "results" / "methods-llava"
FRONT = ROOT / "eval" / "results" / "confirm-front-qwen2_5_vl"
PICTURE = ROOT / "docs" / "assets" / "score-by-call.png"
BEGIN, END = "<!-- python -m eval readme: begin -->", "<!-- python -m eval readme: end -->"
SHARES = (0.25, 0.11)


def block(results: Path = RESULTS) -> str:
    """Return the text between the marks: score and tokens of every method at two budgets, sorted by the smaller one.

    Raises
    ------
    InputError
        The results lack one of the budgets.
    """
    frame = pd.read_csv(results / "table.csv")
    full = frame[frame["run"] == FULL.name].iloc[0]
    usual = frame[(frame["positions"] == "original") & ~frame["method"].isin((*BOUNDS, BLIND.name))]
    at = {share: usual[usual["keep"] == share].set_index("method") for share in SHARES}
    methods = list(dict.fromkeys(usual[usual["run"] != FULL.name]["method"]))
    for share, found in at.items():
        if lacking := [method for method in methods if method not in found.index]:
            raise vtc.InputError(f"{results}: nothing about {', '.join(lacking)} at {share:g}")
    methods.sort(key=lambda method: -at[SHARES[-1]].loc[method, "score"])
    header = ["method", *(title for share in SHARES for title in (f"accuracy at {100 * share:g} %", "tokens"))]
    lines = [["all tokens", *_figures(full) * len(SHARES)]]
    for method in methods:
        name = f"`{method}`, a baseline" if method in BASELINES else f"`{method}`"
        lines.append([name, *(text for share in SHARES for text in _figures(at[share].loc[method]))])
    table = tables.to_markdown_table(header, lines)
    where = (results / "table.md").relative_to(ROOT) if results.is_relative_to(ROOT) else results / "table.md"
    width = (usual["high"] - usual["low"]).max() / 2
    note = (
        f"The reference LLaVA on {int(full['n'])} questions about drawn scenes; 95 % intervals reach up to {width:.2f} "
        "to either side.\nTokens are averaged over the decoder's layers: methods that prune inside it keep more than "
        f"they are asked for.\n[Intervals, agreement, times and conditions]({where})."
    )
    return f"{BEGIN}\n{table}\n\n{note}\n{END}"


def _figures(line: pd.Series) -> list[str]:
    return [f"{line['score']:.3f}", f"{100 * line['kept']:.1f} %"]


def draw(results: Path = FRONT, path: Path = PICTURE) -> None:
    """Draw score against the seconds of a whole call, as the results' table has them."""
    frame = pd.read_csv(results / "table.csv")
    shown = frame[~frame["method"].isin(BOUNDS) & (frame["run"] != BLIND.name)]
    plots.against_call(shown, path, "the reference Qwen2.5-VL on drawn scenes; times at the shape of Qwen2.5-VL-3B")


def write(page: Path = PAGE) -> None:
    """Write `block` between the marks of the page.

    Raises
    ------
    InputError
        The page has no such marks.
    """
    before, _, after = _parts(page.read_text(encoding="utf-8"))
    write_text(page, before + block() + after)


def current(page: Path = PAGE) -> str:
    """Return the present text between the marks, marks included."""
    return _parts(page.read_text(encoding="utf-8"))[1]


def _parts(text: str) -> tuple[str, str, str]:
    first, last = text.find(BEGIN), text.find(END)
    if not 0 <= first < last:
        raise vtc.InputError(f"README has no {BEGIN} and {END}")
    last += len(END)
    return text[:first], text[first:last], text[last:]
