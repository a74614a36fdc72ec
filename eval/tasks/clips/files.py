"""Writes clips as mp4 and JSON lines, and reads mp4."""

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
from vtc.files import replacing


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: int = FPS) -> None:
    """Encode ``frames (T, H, W, 3)`` as H.264; deterministic for one version of the encoder."""
    with replacing(path) as file, av.open(str(file), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "16", "preset": "veryfast", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_mp4(path: Path) -> NDArray[np.uint8]:
    """Return all frames of a video, ``(T, H, W, 3)`` uint8.

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

    The layout is that of the task ``files``: ``videos/NAME.mp4``, and ``questions.jsonl`` with ``question_id``,
    ``video`` (path below ``folder``), ``question``, ``answer``, ``kind`` and ``options`` in every line.

    Returns
    -------
    int
        Number of questions written.
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    total = 0
    with replacing(folder / "questions.jsonl") as file, file.open("w", encoding="utf-8") as lines:
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
