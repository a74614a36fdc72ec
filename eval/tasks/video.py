"""Evenly spaced frames of a video file, or of a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import vtc
from vtc.video import VideoFile, sample_by_count

_PICTURES = (".jpg", ".jpeg", ".png")
_FOLDER_FPS = 3.0
"""Assumed rate of a folder of images, the usual one of extracted frames; a video file states its own."""


@dataclass(frozen=True, eq=False)
class Frames:
    """Decoded frames with what a processor needs to know about them.

    Attributes
    ----------
    frames : ndarray (T, H, W, 3) of uint8
    indices : tuple of int
        Frame numbers in the video, ascending.
    fps : float
        Frame rate of the whole video.
    total : int
        Number of frames of the whole video.
    """

    frames: npt.NDArray[np.uint8]
    indices: tuple[int, ...]
    fps: float
    total: int


@dataclass(frozen=True)
class VideoSource:
    """A video that is decoded when called.

    Attributes
    ----------
    path : Path
        A video file, or a folder of images, one per frame, ordered by name.
    frames : int
        Number of frames to show, each from the middle of one of so many equal parts; all frames if there are fewer.
    """

    path: Path
    frames: int

    def __call__(self) -> Frames:
        """Decode the frames.

        Raises
        ------
        InputError
            File or folder is missing or broken.
        """
        if self.path.is_dir():
            return self._from_folder()
        with VideoFile(self.path) as file:
            picked = self._pick(file.times)
            return Frames(file.read(picked), tuple(picked), file.info.fps, file.info.frames)

    def _from_folder(self) -> Frames:
        files = sorted(path for path in self.path.iterdir() if path.suffix.lower() in _PICTURES)
        if not files:
            raise vtc.InputError(f"{self.path}: no pictures ({', '.join(_PICTURES)}) in this folder")
        picked = self._pick(np.arange(len(files)) / _FOLDER_FPS)
        frames = [np.asarray(vtc.open_image(files[index])) for index in picked]
        if len({frame.shape for frame in frames}) > 1:
            raise vtc.InputError(f"{self.path}: the pictures in this folder differ in size; frames of a video do not")
        return Frames(np.stack(frames), tuple(picked), _FOLDER_FPS, len(files))

    def _pick(self, times: npt.NDArray[np.float64]) -> list[int]:
        times = times - times[0]
        step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        return [int(index) for index in sample_by_count(times, float(times[-1]) + step, self.frames)]
