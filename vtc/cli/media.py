"""`vtc inspect` and `vtc video`: pictures of what was kept, and questions about video files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vtc
from vtc import registry
from vtc.errors import ConfigError, InputError
from vtc.report.views import FITS

_KEEP_RATIO = 0.25
_VIDEO_REFERENCE = "qwen2_5_vl"
"""The reference model that takes videos."""


def add_commands(commands: Any) -> None:
    """Register both subcommands."""
    _add_inspect(commands)
    _add_video(commands)


def _add_shared(parser: argparse.ArgumentParser, method: str) -> None:
    parser.add_argument("--model", default="reference", help="reference, reference:NAME, or a checkpoint's folder")
    parser.add_argument("--method", default=method, help=f"see `vtc methods` ({method})")
    parser.add_argument(
        "--option",
        dest="options",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_option,
        help="option of the method, as often as you like",
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="for methods that draw (0)")


def _option(text: str) -> tuple[str, Any]:
    from vtc.cli.app import _option as parse

    return parse(text)


def _writable(path: Path, suffixes: tuple[str, ...]) -> None:
    """Looked at before a model is loaded, which may take minutes."""
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{path}: the picture is written as {', '.join(suffixes)}.")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist.")


# -------------------------------------------------------------------------------------------------------------- inspect


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="draw which parts of a picture a method keeps")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any file that pillow reads")
    parser.add_argument("--question", default="What is in the picture?", help="for methods that look at the text")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--keep-ratio", type=float, help=f"fraction of visual tokens kept ({_KEEP_RATIO})")
    keep.add_argument("--keep-tokens", type=int, help="visual tokens kept per image, instead of a fraction")
    parser.add_argument("-o", "--output", type=Path, default=Path("kept.png"), help="where the picture goes (kept.png)")
    parser.add_argument("--size", type=int, default=448, help="longer edge of a panel in pixels (448)")
    parser.add_argument("--fit", choices=FITS, help="how the processor fits the picture, where it cannot be asked")
    _add_shared(parser, "vtc-cls")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from vtc.cli.app import _inputs, _load, _open_image

    config = vtc.CompressionConfig(
        method=args.method,
        keep_ratio=_KEEP_RATIO if args.keep_ratio is None and args.keep_tokens is None else args.keep_ratio,
        keep_tokens=args.keep_tokens,
        seed=args.seed,
        options=dict(args.options),
    )
    registry.get_selector(config.method, **config.options)
    _writable(args.output, (".png", ".jpg", ".jpeg", ".webp"))
    image = _open_image(args.image)
    model, processor = _load(args.model, args.dtype, args.device)
    inputs = _inputs(model, processor, image, args.question)
    with vtc.compressed(model, config), torch.inference_mode():
        model(**inputs, logits_to_keep=1)
        report = vtc.report(model)
    drawn = vtc.visualize(report, image, processor=processor, fit=args.fit, size=args.size)
    drawn.save(args.output)
    print(report)
    print(f"\n{args.output}: {drawn.width} x {drawn.height}")
    return 0


# ---------------------------------------------------------------------------------------------------------------- video


def _add_video(commands: Any) -> None:
    parser = commands.add_parser("video", help="answer questions about a video file, of any length, compressed")
    parser.add_argument("video", type=Path, metavar="VIDEO", help="any file that a decoder reads")
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help="several re-use what they can of the first")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--keep-ratio", type=float, help=f"fraction of visual tokens kept ({_KEEP_RATIO})")
    keep.add_argument("--keep-tokens", type=int, help="visual tokens kept of the whole video")
    keep.add_argument("--per-window", type=int, help="visual tokens kept of every window")
    keep.add_argument("--per-frame", type=int, help="visual tokens kept of every frame, each frame by itself")
    parser.add_argument("--fps", type=float, help="frames looked at per second (1)")
    parser.add_argument("--frames", type=int, help="frames looked at over the whole length, instead")
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
    parser.add_argument("--json", action="store_true", help="print everything that is known as JSON lines")
    parser.add_argument("--no-progress", action="store_true", help="no bar on stderr")
    parser.add_argument("-o", "--output", type=Path, help="draw what was kept: .png a sheet, .gif or .webp moving")
    _add_shared(parser, "evs")
    parser.set_defaults(run=_video)


def _video(args: argparse.Namespace) -> int:
    from vtc.cli.app import _load
    from vtc.video.files import VideoFile
    from vtc.video.pipeline import VideoQAPipeline

    budgets = {name: getattr(args, name) for name in ("keep_ratio", "keep_tokens", "per_window", "per_frame")}
    if not any(value is not None for value in budgets.values()):
        budgets["keep_ratio"] = _KEEP_RATIO
    registry.get_selector(args.method, **dict(args.options))
    if args.output is not None:
        _writable(args.output, (".png", ".gif", ".webp"))
        if args.strategy == "captions":
            raise ConfigError("--output draws what compression kept; --strategy captions has no such picture.")
    VideoFile(args.video, args.decoder).close()  # broken files show before a model is loaded
    name = f"reference:{_VIDEO_REFERENCE}" if args.model == "reference" else args.model
    model, processor = _load(name, args.dtype, args.device)
    pipeline = VideoQAPipeline(
        model,
        processor,
        args.method,
        **budgets,
        fps=args.fps,
        frames=args.frames,
        scenes=args.scenes,
        window=args.window,
        strategy=args.strategy,
        decoder=args.decoder,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        progress=not args.no_progress and sys.stderr.isatty(),
        **dict(args.options),
    )
    session = pipeline.watch(args.video)
    answer = None
    for question in args.questions:
        answer = session.ask(question)
        print(json.dumps(answer.to_dict()) if args.json else f"{question}\n{answer}\n")
    if args.output is not None and answer is not None and answer.report is not None:
        _draw(args, answer.report, processor, answer.times)
    return 0


def _draw(args: argparse.Namespace, report: vtc.Report, processor: Any, times: Sequence[float]) -> None:
    """The sampled frames are read again: they were let go of window by window."""
    from vtc.report.visualize import animation, save_animation
    from vtc.video.files import VideoFile

    sheet = args.output.suffix.lower() == ".png"
    # A sheet of some thousand pixels, and a moving picture of some hundred megabytes in memory, are what viewers take.
    size = max(16, min(224, 8000 // math.ceil(math.sqrt(len(times))))) if sheet else 320 if len(times) <= 300 else 128
    with VideoFile(args.video, args.decoder) as file:
        frames = file.pictures(times, size)
    if sheet:
        titles = size >= 96  # below, they are wider than their panel
        vtc.visualize(report, frames, processor=processor, size=size, titles=titles).save(args.output)
    else:
        rate = len(times) / max(times[-1] - times[0], 1e-9) if len(times) > 1 else 1.0
        save_animation(animation(report, frames, processor=processor, size=size), args.output, fps=min(rate, 10.0))
    print(f"{args.output}: {len(frames)} frame{'' if len(frames) == 1 else 's'}", file=sys.stderr)
