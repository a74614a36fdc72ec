"""`vtc video`: answer questions about a video file, of any length, with compression."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vtc
from vtc import limits, registry
from vtc.cli import arguments
from vtc.config import DEFAULT_METHOD
from vtc.errors import ConfigError

_REFERENCE_MODEL = "reference:qwen2_5_vl"
"""The reference model that takes videos."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("video", type=Path, metavar="VIDEO", help="any file that a decoder reads")
    parser.add_argument(
        "questions", nargs="+", metavar="QUESTION", help="later ones re-use what was computed for the first"
    )
    arguments.add_model(parser)
    arguments.add_method(parser, DEFAULT_METHOD, "--option")
    keep = arguments.add_budget(parser, of="the whole video")
    keep.add_argument("--per-window", type=int, help="visual tokens kept of every window")
    keep.add_argument("--per-frame", type=int, help="visual tokens kept of every frame, each frame by itself")
    arguments.add_site(parser)
    arguments.add_seed(parser)
    parser.add_argument("--fps", type=float, help="frames sampled per second (1, but at least 8 frames in all)")
    parser.add_argument("--frames", type=int, help="frames sampled over the whole length, instead")
    parser.add_argument(
        "--scenes",
        type=float,
        metavar="CHANGE",
        help="first frame of every scene, instead; a scene is a change of brightness above this, 0 to 1 (try 0.1)",
    )
    parser.add_argument("--window", type=int, default=32, help="frames in memory at a time (32)")
    parser.add_argument(
        "--strategy",
        choices=("compress", "captions"),
        default="compress",
        help="captions: describe every window in a sentence and ask about the sentences, as a baseline (compress)",
    )
    parser.add_argument("--decoder", help="decord, av or torchcodec; by default the first that can")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of an answer (64)")
    parser.add_argument("--json", action="store_true", help="print answers and measurements as JSON lines")
    parser.add_argument("--no-progress", action="store_true", help="no bar on stderr")
    parser.add_argument("-o", "--output", type=Path, help="draw what was kept: .png a sheet, .gif or .webp animated")


def run(args: argparse.Namespace) -> int:
    """Print the answers, and draw what was kept if asked."""
    from vtc.video import VideoFile, check_sampling

    check_sampling(args.fps, args.frames, args.scenes)
    limits.check_count("--window", args.window, limits.MAX_FRAMES)
    limits.check_count("--max-new-tokens", args.max_new_tokens, limits.MAX_NEW_TOKENS)
    budgets = {name: getattr(args, name) for name in ("keep_ratio", "keep_tokens", "per_window", "per_frame")}
    if not any(value is not None for value in budgets.values()):
        budgets["keep_ratio"] = arguments.DEFAULT_KEEP_RATIO
    name = _REFERENCE_MODEL if args.model == "reference" else args.model
    options = arguments.options(args.method, args.options, name, args.keep_tokens)
    registry.get_selector(args.method, **options)
    _check_budget(budgets)
    if args.output is not None:
        arguments.check_output(args.output, (".png", ".gif", ".webp"))
        if args.strategy == "captions":
            raise ConfigError("--output draws what compression kept; --strategy captions has no such picture.")
    VideoFile(args.video, args.decoder).close()  # refuses a broken file before a model is loaded
    model, processor = arguments.load_model(name, args.dtype, args.device)
    pipeline = vtc.VideoQAPipeline(
        model,
        processor,
        args.method,
        **budgets,
        **arguments.site(args),
        fps=args.fps,
        frames=args.frames,
        scenes=args.scenes,
        window=args.window,
        strategy=args.strategy,
        decoder=args.decoder,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        progress=not args.no_progress and sys.stderr.isatty(),
        **options,
    )
    session = pipeline.watch(args.video)
    answer = None
    for question in args.questions:
        answer = session.ask(question)
        print(json.dumps(answer.to_dict()) if args.json else f"{question}\n{answer}\n")
    if args.output is not None and answer is not None and answer.report is not None:
        _draw(args, answer.report, processor, answer.times)
    return 0


def _check_budget(budgets: dict[str, Any]) -> None:
    """Refuse what the pipeline would, before a model is loaded."""
    from vtc.video.windows import VideoBudget

    VideoBudget(**budgets)


def _draw(args: argparse.Namespace, report: vtc.Report, processor: Any, times: Sequence[float]) -> None:
    """Read the sampled frames again, which no longer are in memory, and draw what was kept of them."""
    from vtc.report.visualize import animation, save_animation
    from vtc.video import VideoFile

    sheet = args.output.suffix.lower() == ".png"
    # Viewers take a sheet of some thousand pixels, and an animation of some hundred megabytes in memory.
    size = min(224, 8000 // math.ceil(math.sqrt(len(times)))) if sheet else 320 if len(times) <= 300 else 128
    # Every range of decoder layers that sees the same tokens has panels of its own; a title adds up to the area of one.
    panels = len(times) * (1 + sum(len(segment.selections) for segment in report.segments))
    size = max(limits.MIN_PANEL, min(size, math.isqrt(limits.MAX_DRAWN_PIXELS // panels)))
    with VideoFile(args.video, args.decoder) as file:
        frames = file.pictures(times, size)
    if sheet:
        titles = size >= 96  # below, they are wider than their panel
        arguments.save(vtc.visualize(report, frames, processor=processor, size=size, titles=titles), args.output)
    else:
        rate = len(times) / max(times[-1] - times[0], 1e-9) if len(times) > 1 else 1.0
        shown = animation(report, frames, processor=processor, size=size)
        save_animation(shown, args.output, fps=min(max(rate, 0.5), 10.0))  # nobody waits longer for the next frame
    print(f"{args.output}: {len(frames)} frame{'' if len(frames) == 1 else 's'}", file=sys.stderr)
