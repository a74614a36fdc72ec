"""Methods before the decoder on seeded tensors: time, memory and choices, beside their transcriptions."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtc import registry
from vtc.bench._models import LLAVA_7B, build
from vtc.bench._ops import Draw
from vtc.bench._transcribing import Choice
from vtc.bench._transcriptions import TRANSCRIPTIONS
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import (
    CLOCKS,
    Case,
    Timing,
    conditions,
    describe,
    interleave,
    markdown_table,
    megabytes,
    repeated,
    seconds,
    spread,
    write_json,
)
from vtc.budget import resolve_budget
from vtc.core.context import VisualContext
from vtc.core.eviction import CacheSelector
from vtc.core.grids import Grid
from vtc.core.observations import TokenGrids
from vtc.core.selector import Selector
from vtc.core.signals import Signal
from vtc.core.sites import BeforeDecoder
from vtc.core.stage import ModelShape
from vtc.errors import ConfigError

__all__ = ["VIDEO", "draw_context", "measure", "methods", "run", "saved_seconds", "summary", "table"]

VIDEO = ("dycoke", "evs", "fastvid", "flashvid", "holitom", "prunevid", "vidcom2")
GRIDS: dict[int, tuple[Grid, ...]] = {576: ((1, 24, 24),), 2880: ((1, 24, 24),) * 5, 12544: ((1, 112, 112),)}
VIDEOS: dict[int, tuple[Grid, ...]] = {576: ((4, 12, 12),), 2880: ((20, 12, 12),), 12544: ((64, 14, 14),)}

_SHAPE = ModelShape(decoder_layers=32, vision_layers=24, feature_layer=22, cls=True)
_SIZES = {"layers": 1, "heads": 16, "queries": 16, "T": 64, "D": 1024, "d": 1024}
"""Sizes of the axes of signals: CLIP ViT-L/14-336, and a prompt of 64 text tokens."""

_SCENE = 8  # frames
_TARGET = 0.02  # of the prefill saved
_AT = (2880, 3584)  # tokens and width at which the target holds
_FEW_SECONDS = 5.0  # longer runs are repeated twice at most, without a warm-up
_MOST_BYTES = 6e9


def methods(named: Sequence[str] | None) -> list[str]:
    """Return the methods to measure: those that were named, or all whose first stage is before the decoder.

    Raises
    ------
    ConfigError
        One that was named has another first stage.
    """
    found = []
    for name in named or [name for name, cls in registry.selectors().items() if cls.__module__.startswith("vtc.")]:
        selector = registry.get_selector(name)
        if not named and (isinstance(selector, CacheSelector) or selector.trained):  # may need a package, or modules
            continue
        if isinstance(_stage_of(selector, 0.5)[1].site, BeforeDecoder):
            found.append(name)
        elif named:
            raise ConfigError(f"--method {name}: its tokens do not leave before the decoder.")
    return found


def _stage_of(selector: Selector, keep_ratio: float) -> tuple[Selector, Any]:
    """Return the method as a CLIP tower and a 7B decoder settle it, and its first stage."""
    selector = selector.resolve(_SHAPE, keep_ratio)
    return selector, selector.stages(_SHAPE, keep_ratio)[0]


def draw_context(
    method: str, tokens: int, width: int, keep_ratio: float, draw: Draw, grids: tuple[Grid, ...] | None = None
) -> tuple[Selector, VisualContext]:
    """Draw features and signals for one method; what stands in videos half of the time moves little."""
    selector, stage = _stage_of(registry.get_selector(method), keep_ratio)
    video = method in VIDEO
    grids = grids or (VIDEOS if video else GRIDS)[tokens]
    features = _frames(draw, grids[0], width) if video else draw.tokens(tokens, width)
    signals: dict[Signal, Tensor] = {}
    for signal in stage.requires:
        if signal.reads is TokenGrids:
            signals[signal] = signal.compute(TokenGrids(grids, draw.device))
            continue
        layers = getattr(signal, "layers", None)
        sizes = {**_SIZES, "N": tokens, "layers": len(layers or (0,))}
        if not signal.per_token:
            sizes["D"] = width  # the text is as wide as the features
        shape = [sizes.get(axis, 2) for axis in signal.axes]
        if signal.axes[-1] == "N":
            signals[signal] = draw(*shape).float().softmax(dim=-1)
        else:
            signals[signal] = draw.tokens(shape[0], shape[1]) if len(shape) == 2 else draw(*shape)
    context = VisualContext(
        features=features,
        budget=resolve_budget(tokens, keep_ratio, None),
        generator=torch.Generator().manual_seed(0),
        grids=grids,
        modality="video" if video else "image",
        site=stage.site,
        keep_ratio=keep_ratio,
        signals=signals,
    )
    return selector, context.check()


def _frames(draw: Draw, grid: Grid, width: int) -> Tensor:
    """Draw scenes of `_SCENE` frames in which every second place stands still."""
    t, h, w = grid
    scenes = [draw.tokens(h * w, width) for _ in range(-(-t // _SCENE))]
    moves = torch.where(torch.arange(h * w, device=draw.device) % 2 == 0, 0.2, 1.0)[:, None].to(scenes[0].dtype)
    return torch.cat([scenes[frame // _SCENE] + moves * draw(h * w, width) for frame in range(t)])


def run(args: argparse.Namespace, sizes: Sequence[int], widths: Sequence[int]) -> int:
    """Measure all methods at all sizes, print the tables and write JSON if requested."""
    names = methods(args.method)
    results: list[dict[str, Any]] = []
    for width in widths:
        for name in names:
            known: dict[int, tuple[float, float]] = {}
            for tokens in sorted(sizes):
                results.append(measure(name, tokens, width, args, known))
    measured = any((r["tokens"], r["width"]) == _AT for r in results)
    saved = saved_seconds(args) if measured else None
    stated = conditions(
        dtype=args.dtype,
        device=args.device,
        clock=args.clock,
        repeats=args.repeats,
        warmup=args.warmup,
        keep_ratio=args.keep_ratio,
    )
    clock = "Processor time" if args.clock == "cpu" else "Wall-clock time"
    print(table(results, saved))
    print(
        f"\n{clock}, batch 1, {args.dtype}: median [quartiles] of {args.repeats} interleaved rounds, of two where one "
        f"takes more than {_FEW_SECONDS:g} s; the speed-up is the median of their ratios. Peaks are of tensors beyond "
        f"the inputs. {describe(stated)}"
    )
    print("\n" + summary(results, saved))
    if args.json:
        found = {"benchmark": "selectors", "conditions": stated, "saved_seconds": saved, "results": results}
        write_json(args.json, found)
    return 0


@torch.no_grad()
def measure(
    name: str, tokens: int, width: int, args: argparse.Namespace, known: dict[int, tuple[float, float]]
) -> dict[str, Any]:
    """Measure one method at one size; return a JSON-able result.

    `known` has seconds and bytes of the transcription at smaller sizes, and gets those of this one. It is not run where
    the cube of the tokens would make it longer than ``--most-seconds``, or their square larger than 6 GB.
    """
    draw = Draw(torch.Generator().manual_seed(0), getattr(torch, args.dtype), args.device)
    selector, ctx = draw_context(name, tokens, width, args.keep_ratio, draw)

    def ours() -> Choice:
        selection = selector.select(ctx)
        return selection.keep, None if selection.assign is None else selection.merge(ctx.features)

    works: dict[str, Callable[[], Choice]] = {"ours": ours}
    why = None
    transcription = TRANSCRIPTIONS.get(name)
    if transcription is None:
        why = "none"
    elif known and (reason := _too_much(tokens, known, args.most_seconds)):
        why = reason
    else:
        works["plain"] = lambda: transcription(selector, ctx)
    choices, took = {}, {}
    for label, work in works.items():
        began = time.perf_counter()
        choices[label] = work()
        took[label] = time.perf_counter() - began
    if "plain" in works and not len(choices["plain"][0]):
        del works["plain"], took["plain"]
        why = "undefined there"
    few = max(took.values()) > _FEW_SECONDS
    timings = interleave(
        {label: Case(repeated(work, args.device, CLOCKS[args.clock])) for label, work in works.items()},
        repeats=min(args.repeats, 2) if few else args.repeats,
        warmup=0 if few else args.warmup,
    )
    result: dict[str, Any] = {
        "method": name,
        "tokens": tokens,
        "width": width,
        "kept": len(choices["ours"][0]),
        "ours": timings["ours"]["run"].to_dict(),
        "ours_bytes": peak_bytes(ours, args.device),
        "not_run": why,
    }
    if "plain" in works:
        pairs = zip(timings["plain"]["run"].seconds, timings["ours"]["run"].seconds, strict=True)
        result |= {
            "plain": timings["plain"]["run"].to_dict(),
            "plain_bytes": peak_bytes(works["plain"], args.device),
            "speed_up": Timing(tuple(plain / ours for plain, ours in pairs)).median,
            "agreement": _agreement(choices["ours"], choices["plain"]),
        }
        known[tokens] = (result["plain"]["median"], result["plain_bytes"])
    return result


def _too_much(tokens: int, known: dict[int, tuple[float, float]], most_seconds: float) -> str | None:
    """Say why a transcription is not run, given its cost at a smaller size; None if it is."""
    smaller = max(known)
    growth = tokens / smaller
    lasts, needs = known[smaller][0] * growth**3, known[smaller][1] * growth**2
    if lasts > most_seconds:
        return f"up to {seconds(lasts)}"
    return f"up to {megabytes(needs)}" if needs > _MOST_BYTES else None


def _agreement(ours: Choice, plain: Choice) -> str:
    """Describe how many of the kept tokens are the same."""
    common = int(torch.isin(ours[0], plain[0]).sum())
    return "equal" if common == len(ours[0]) == len(plain[0]) else f"{common} of {len(plain[0])}"


@torch.inference_mode()
def saved_seconds(args: argparse.Namespace) -> float:
    """Measure what compression saves of a prefill of 2,880 visual and 64 text tokens: a layer of 7B, times its depth.

    In bfloat16, the fastest type on a CPU; the median of at most three rounds.
    """
    model = build(LLAVA_7B, 1, torch.bfloat16, args.device)
    decoder, width = model.get_decoder(), model.config.text_config.hidden_size
    lengths = {"whole": _AT[0], "kept": resolve_budget(_AT[0], args.keep_ratio, None)}

    def prefill(visual: int) -> Callable[[], Any]:
        embeds = torch.randn(1, visual + _SIZES["T"], width, generator=torch.Generator().manual_seed(0))
        embeds = embeds.to(args.device, torch.bfloat16)
        return lambda: decoder(inputs_embeds=embeds, use_cache=True)

    cases = {name: Case(repeated(prefill(visual), args.device, CLOCKS[args.clock])) for name, visual in lengths.items()}
    timings = interleave(cases, repeats=min(args.repeats, 3), warmup=min(args.warmup, 1))
    pairs = zip(timings["whole"]["run"].seconds, timings["kept"]["run"].seconds, strict=True)
    return LLAVA_7B.full_depth * statistics.median(whole - kept for whole, kept in pairs)


def table(results: Sequence[dict[str, Any]], saved: float | None) -> str:
    """Format results as a markdown table."""
    header = ("method", "N", "d", "kept", "vtc", "plain", "speed-up", "vtc peak", "plain peak", "agreement", "of saved")
    rows = []
    for r in results:
        plain = "plain" in r
        share = saved is not None and (r["tokens"], r["width"]) == _AT
        rows.append(
            (
                r["method"],
                f"{r['tokens']}",
                f"{r['width']}",
                f"{r['kept']}",
                spread(r["ours"]),
                spread(r["plain"]) if plain else r["not_run"],
                f"{r['speed_up']:.3g}x" if plain else "",
                megabytes(r["ours_bytes"]),
                megabytes(r["plain_bytes"]) if plain else "",
                r.get("agreement", ""),
                f"{100 * r['ours']['median'] / saved:.2f} %" if share and saved else "",
            )
        )
    return markdown_table(header, rows)


def summary(results: Sequence[dict[str, Any]], saved: float | None) -> str:
    """Say which methods are slower than their transcription, and which cost more than the target."""
    behind = [r for r in results if r.get("speed_up", 1) < 1]
    slower = [f"{r['method']} ({r['tokens']}, {r['width']}: {r['speed_up']:.2f}x)" for r in behind]
    lines = [f"Slower than the transcription: {', '.join(slower) or 'none'}."]
    if saved is not None:
        at = [r for r in results if (r["tokens"], r["width"]) == _AT]
        dear = [r["method"] for r in at if r["ours"]["median"] > _TARGET * saved]
        lines.append(
            f"At {_AT[0]} tokens, {_AT[1]} wide, more than {100 * _TARGET:g} % of the {seconds(saved)} that they save "
            f"of a 7B prefill (one layer measured, times {LLAVA_7B.full_depth}; bfloat16): {', '.join(dear) or 'none'}."
        )
    return "\n".join(lines)
