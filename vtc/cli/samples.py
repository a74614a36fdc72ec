"""Files of prompts for `vtc calibrate` and `vtc advise`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import vtc
from vtc import limits
from vtc.chat import chat, processing
from vtc.errors import ConfigError, InputError
from vtc.plain import parse_json

_FORM = '{"image": PATH, "question": TEXT} or {"video": PATH, "question": TEXT}'


def add_arguments(parser: argparse.ArgumentParser, flag: str | None = None, *, more: str = "") -> None:
    """Add the file, as an argument or under `flag`, what `more` its lines may have, and how much is read of it."""
    named: dict[str, Any] = {} if flag is None else {"dest": "samples", "required": True}
    parser.add_argument(
        flag or "samples",
        type=Path,
        metavar="SAMPLES.jsonl",
        help=f"one sample per line: {_FORM}{more}; paths are relative to the file",
        **named,
    )
    parser.add_argument("--limit", type=int, help="use so many samples, from the start (all)")
    parser.add_argument("--frames", type=int, default=8, help="frames sampled of a video, evenly spaced (8)")


def read(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Read each sample: its question, and its picture or frames, decoded.

    Raises
    ------
    InputError, ConfigError
        The file, a line of it, or a picture or video cannot be read; a number is out of range.
    """
    from vtc.video import VideoFile, sample_by_count

    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}.")
    limits.check_count("--frames", args.frames, limits.MAX_FRAMES)
    found = []
    for kind, path, said in _lines(args.samples)[: args.limit]:
        if kind == "image":
            found.append({**said, "image": vtc.open_image(path)})
            continue
        with VideoFile(path) as file:
            picked = sample_by_count(file.times, file.info.duration, args.frames)
            found.append({**said, "frames": file.read(picked), "picked": picked, "info": file.info})
    return found


def encode(samples: list[dict[str, Any]], processor: Any) -> list[Any]:
    """Prepare samples for `vtc.calibrate` and `vtc.advise`: pairs of pictures and questions, encoded inputs of videos.

    Raises
    ------
    InputError
        A sample is a video, and the processor takes none.
    """
    return [
        (sample["image"], sample["question"]) if "image" in sample else _video_inputs(sample, processor)
        for sample in samples
    ]


def _video_inputs(sample: dict[str, Any], processor: Any) -> Any:
    from transformers.video_utils import VideoMetadata

    if not all(getattr(processor, name, None) for name in ("video_processor", "video_token")):
        raise InputError(f"{type(processor).__name__} takes no videos; see the column 'inputs' of `vtc models`.")
    text = chat(processor, ["video"], sample["question"])
    fps, frames = sample["info"].fps or 1.0, sample["info"].frames
    shown = VideoMetadata(
        total_num_frames=frames, fps=fps, duration=frames / fps, frames_indices=[int(i) for i in sample["picked"]]
    )
    with processing(processor, f"a video of {len(sample['frames'])} frames"):
        inputs = processor(
            text=[text],
            videos=[sample["frames"]],
            do_sample_frames=False,
            video_metadata=[shown],
            return_tensors="pt",
        )
    inputs.pop("video_metadata", None)
    return inputs


def _lines(path: Path) -> list[tuple[str, Path, dict[str, Any]]]:
    """Kind and file of each line, with its question and, where it has them, the answer and the region."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}.") from error
    except ValueError as error:  # no UTF-8, or a name with a null character
        raise InputError(f"{str(path)!r}: {error}.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            sample = parse_json(line)
            (kind,) = {"image", "video"} & set(sample)
            said = {name: sample[name] for name in ("question", "answer") if sample.get(name) is not None}
            if "question" not in said or not all(isinstance(text, str) for text in said.values()):
                raise ValueError
            if sample.get("region") is not None:
                said["region"] = sample["region"]
            if "\0" in sample[kind]:
                raise ValueError
            found.append((kind, path.parent / sample[kind], said))
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: expected {_FORM}, got {line[:80]!r}.") from error
    if not found:
        raise InputError(f"{path}: no samples in it.")
    return found
