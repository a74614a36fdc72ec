"""Clips as files: mp4 and JSON lines, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from eval.tasks.clips.clip import FPS, make_clip
from eval.tasks.clips.questions import ask
from eval.tasks.scenes.sources import Split

QUESTIONS_FILE = "questions.jsonl"


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: int = FPS) -> None:
    """Encode ``frames (T, H, W, 3)`` as H.264; the same frames give the same file with the same encoder version."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "16", "preset": "veryfast", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_mp4(path: Path) -> NDArray[np.uint8]:
    """All frames of a video, ``(T, H, W, 3)`` uint8.

    Raises
    ------
    ValueError
        If the file holds no video frame.
    """
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if not frames:
        raise ValueError(f"{path} holds no video frame")
    return np.stack(frames)


def write_task(folder: Path, split: Split, count: int, *, seed: int = 0, per_clip: int = 7) -> int:
    """Write ``count`` clips and their questions into ``folder``.

    The layout is the usual one of video question answering: ``videos/NAME.mp4`` and ``questions.jsonl`` with
    ``question_id``, ``video`` (path from ``folder``), ``question``, ``answer``, ``kind``, ``options`` a line.

    Returns
    -------
    int
        Number of questions written.
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    total = 0
    with (folder / QUESTIONS_FILE).open("w") as lines:
        for index in range(count):
            clip = make_clip(split, seed, index)
            name = f"videos/{split}_{seed}_{index:05d}.mp4"
            write_mp4(folder / name, clip.frames)
            for number, question in enumerate(ask(clip, per_clip)):
                record = {
                    "question_id": f"{split}_{seed}_{index:05d}_{number}",
                    "video": name,
                    "question": question.text,
                    "answer": question.answer,
                    "kind": question.kind,
                    "options": list(question.options),
                }
                lines.write(json.dumps(record) + "\n")
                total += 1
    return total


def read_task(folder: Path) -> list[dict[str, Any]]:
    """The records of a written task.

    Raises
    ------
    ValueError
        If a line is not JSON or lacks a field, naming the line.
    """
    wanted = {"question_id", "video", "question", "answer", "kind", "options"}
    records = []
    for number, line in enumerate((folder / QUESTIONS_FILE).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / QUESTIONS_FILE}, line {number}: not JSON ({error})") from error
        if missing := wanted - set(record):
            raise ValueError(f"{folder / QUESTIONS_FILE}, line {number}: lacks {sorted(missing)}")
        records.append(record)
    return records
