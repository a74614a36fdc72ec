"""Small video files for tests: brightness identifies every frame."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

LEVELS = 12
"""Brightness between one frame and the next, well above what codecs lose."""


def frames(count: int, width: int = 64, height: int = 48) -> list[np.ndarray[Any, Any]]:
    """`count` frames, brighter and brighter, the upper left quarter inverted so that orientation can be checked."""
    out = []
    for index in range(count):
        frame = np.full((height, width, 3), 20 + LEVELS * (index % 18), dtype=np.uint8)
        frame[: height // 2, : width // 2] = 255 - frame[0, 0]
        out.append(frame)
    return out


def number(frame: np.ndarray[Any, Any]) -> int:
    """Which of `frames` this is, by its lower right corner."""
    corner = frame[-frame.shape[0] // 4 :, -frame.shape[1] // 4 :].mean()
    return round((float(corner) - 20) / LEVELS)


def write(
    path: Path,
    shown: Sequence[np.ndarray[Any, Any]],
    *,
    fps: float = 10,
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    times: Sequence[float] | None = None,
    gop: int = 6,
    sound: bool = False,
    **container_options: str,
) -> Path:
    """Write frames (H, W, 3), at constant `fps` or at these times in seconds."""
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = shown[0].shape[:2] if shown else (48, 64)
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        stream.bit_rate = 4_000_000
        if not shown:
            container.start_encoding()  # a file needs its header
        audio = container.add_stream("aac", rate=16000) if sound else None
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[index]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            _mux_silence(container, audio)
    return path


def write_sound(path: Path) -> Path:
    """A file without pictures."""
    with av.open(str(path), "w") as container:
        _mux_silence(container, container.add_stream("aac", rate=16000))
    return path


def _mux_silence(container: Any, stream: Any) -> None:
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
    silence.sample_rate = 16000
    container.mux(stream.encode(silence))
    container.mux(stream.encode(None))


def turned(path: Path, turns: int = 1) -> Path:
    """Mark an mp4 as taken with the camera held so many quarter turns to the side: shown, it turns clockwise."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b = {1: (0, 1), 2: (-1, 0), 3: (0, -1)}[turns]
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path
