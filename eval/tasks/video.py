"""Frames of a video that a task shows: evenly spaced, out of a file or a folder of pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

import vtc
from vtc.video import VideoFile, sample_by_count

_PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, eq=False)
class Footage:
    """Frames as a processor wants them.

    Attributes
    ----------
    frames : ndarray (T, H, W, 3) of uint8
    indices : tuple of int
        Their numbers in the video, ascending.
    fps : float
        Frames a second of the whole video, which these numbers count.
    total : int
        Frames of the whole video.
    subtitles : tuple of str
        What is said while these frames are on screen, each line once.
    """

    frames: npt.NDArray[np.uint8]
    indices: tuple[int, ...]
    fps: float
    total: int
    subtitles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clip:
    """A piece of a video, opened when it is called.

    Attributes
    ----------
    path : Path
        A video file, or a folder of pictures, one a frame, in the order of their names.
    frames : int
        How many are shown: each from the middle of one of so many equal parts. All there are, if there are fewer.
    start, end : float, optional
        Seconds; the whole video unless given.
    fps : float
        Frames a second of a folder of pictures; files know their own.
    subtitles : Path, optional
        An .srt file; it may be missing.
    """

    path: Path
    frames: int
    start: float | None = None
    end: float | None = None
    fps: float = 3.0
    subtitles: Path | None = None

    def __call__(self) -> Footage:
        """The frames.

        Raises
        ------
        InputError
            File or folder is missing or broken, or nothing lies between start and end.
        """
        if self.path.is_dir():
            return self._from_folder()
        with VideoFile(self.path) as file:
            picked = self._pick(file.times)
            spoken = self._spoken([float(file.times[index]) for index in picked])
            return Footage(file.read(picked), tuple(picked), file.info.fps, file.info.frames, spoken)

    def _from_folder(self) -> Footage:
        files = sorted(path for path in self.path.iterdir() if path.suffix.lower() in _PICTURES)
        if not files:
            raise vtc.InputError(f"{self.path}: no pictures ({', '.join(_PICTURES)}) in this folder")
        picked = self._pick(np.arange(len(files)) / self.fps)
        try:
            frames = [np.asarray(Image.open(files[index]).convert("RGB")) for index in picked]
            return Footage(np.stack(frames), tuple(picked), self.fps, len(files))
        except UnidentifiedImageError as error:
            raise vtc.InputError(f"{error}: not a picture that pillow can read") from error
        except (OSError, ValueError) as error:
            raise vtc.InputError(f"{self.path}: {error}") from error

    def _spoken(self, times: Sequence[float]) -> tuple[str, ...]:
        if self.subtitles is None or not self.subtitles.is_file():
            return ()
        lines = read_srt(self.subtitles)
        return tuple(text for start, end, text in lines if any(start <= time < end for time in times))

    def _pick(self, times: npt.NDArray[np.float64]) -> list[int]:
        start = self.start if self.start is not None else 0.0
        end = self.end if self.end is not None else np.inf
        inside = np.flatnonzero((times >= start) & (times <= end))
        if not len(inside):
            raise vtc.InputError(f"{self.path}: no frames from {start:g} to {end:g} s; it ends at {times[-1]:.2f} s")
        part = times[inside] - times[inside[0]]
        step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        return [int(inside[index]) for index in sample_by_count(part, float(part[-1]) + step, self.frames)]


_TIMES = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)")


def read_srt(path: Path) -> list[tuple[float, float, str]]:
    """Start and end in seconds, and the text without markup, of every subtitle.

    Raises
    ------
    InputError
        There is text without times.
    """
    found = []
    for number, block in enumerate(re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig").strip()), 1):
        lines = block.strip().splitlines()
        times = next((index for index, line in enumerate(lines) if _TIMES.search(line)), None)
        if times is None:
            if any(line.strip() for line in lines):
                raise vtc.InputError(f"{path}, subtitle {number}: no times in {block[:60]!r}")
            continue
        match = _TIMES.search(lines[times])
        fields = [int(field) for field in match.groups()] if match else []
        start, end = (3600 * h + 60 * m + s + ms / 1000 for h, m, s, ms in (fields[:4], fields[4:]))
        text = re.sub(r"<[^>]*>|\{[^}]*\}", "", " ".join(lines[times + 1 :])).strip()
        if text:
            found.append((start, end, text))
    return found
