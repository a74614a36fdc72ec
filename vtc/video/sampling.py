"""Which frames of a video are looked at: at a rate, a number of them, or one of every scene."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vtc.errors import ConfigError
from vtc.limits import MAX_FRAMES, check_count, check_fps
from vtc.video.files import Frames, Times, VideoFile

__all__ = ["check_sampling", "sample_by_count", "sample_by_default", "sample_by_fps", "sample_by_scenes"]

_DEFAULT_FPS, _LEAST_FRAMES = 1.0, 8
"""One frame per second is usual for long videos, but of a clip of two seconds it shows next to nothing."""


def check_sampling(fps: float | None, frames: int | None, scenes: float | None) -> None:
    """Raise unless these say which frames to look at: `fps`, or `frames`, or `scenes` with or without `frames`.

    Raises
    ------
    ConfigError
        They contradict each other, or one is out of its range: `fps` above 0 and at most `vtc.limits.MAX_FPS` frames
        per second, `frames` from 1 to `vtc.limits.MAX_FRAMES`, `scenes` between 0 and 1.
    """
    if fps is not None and (frames is not None or scenes is not None):
        raise ConfigError("Give fps, or frames, or scenes with or without frames.")
    if fps is not None:
        check_fps(fps)
    if frames is not None:
        check_count("frames", frames, MAX_FRAMES)
    if scenes is not None:
        _check_change(scenes)


def _check_change(change: float) -> None:
    if not 0 < change < 1:
        raise ConfigError(f"A change of scene is a difference between 0 and 1, got {change}.")


def sample_by_default(times: Times, duration: float) -> list[int]:
    """Return the indices of the frames that are looked at where nobody says which.

    One frame per second, as `sample_by_fps`; where these are fewer than 8, 8 over the whole length, as
    `sample_by_count`, and every frame of a clip that has no more.
    """
    picked = sample_by_fps(times, duration, _DEFAULT_FPS)
    if len(picked) < _LEAST_FRAMES:
        picked = sample_by_count(times, duration, _LEAST_FRAMES)
    if len(picked) < min(_LEAST_FRAMES, len(times)):  # one frame stands still so long that several parts show it
        middles = (np.arange(_LEAST_FRAMES) + 0.5) * len(times) / _LEAST_FRAMES
        picked = middles.astype(int).tolist()
    return picked


def sample_by_fps(times: Times, duration: float, fps: float) -> list[int]:
    """Return the index of the frame shown at 0, 1 / fps, 2 / fps, ... seconds, each frame once.

    Raises
    ------
    ConfigError
        `fps` is not positive, or above `vtc.limits.MAX_FPS`.
    """
    check_fps(fps)
    # Frame i is on screen from times[i] to times[i + 1]; times are rounded to the file's own clock, so a frame due
    # within a microsecond is on screen. Counting what is due before each border takes no list of what is due.
    due = np.ceil([*(times - 1e-6) * fps, max(duration - 1e-6, 1e-9) * fps]).clip(min=0)
    return np.flatnonzero(np.diff(due) > 0).tolist()


def sample_by_count(times: Times, duration: float, count: int) -> list[int]:
    """Return the index of the frame shown in the middle of each of `count` equal parts, or of every frame.

    Raises
    ------
    ConfigError
        `count` is not positive.
    """
    if count < 1:
        raise ConfigError(f"The number of frames must be 1 or more, got {count}.")
    if count >= len(times):
        return list(range(len(times)))
    return _on_screen(times, (np.arange(count) + 0.5) * duration / count)


def sample_by_scenes(
    video: VideoFile, change: float = 0.1, *, fps: float = 4.0, window: int = 64, count: int | None = None
) -> list[int]:
    """Return the index of the first frame of every scene.

    A scene begins where two frames, `1 / fps` seconds apart, differ by more than `change`: the mean absolute difference
    of their brightness, 0 to 1, in squares of 1/16 of the picture. With `count`, only the largest changes count.

    Raises
    ------
    ConfigError
        `change` is not within 0 and 1, or `count` is not positive.
    """
    _check_change(change)
    if count is not None and count < 1:
        raise ConfigError(f"The number of frames must be 1 or more, got {count}.")
    scanned = sample_by_fps(video.times, video.info.duration, fps)
    before: npt.NDArray[np.float64] | None = None
    changes: list[float] = []
    for frames in video.windows(scanned, window):
        for frame in frames:
            now = _thumbnail(frame)
            changes.append(0.0 if before is None else float(np.abs(now - before).mean()))
            before = now
    starts = [place for place, value in enumerate(changes) if value > change]
    if count is not None:
        starts = sorted(sorted(starts, key=lambda place: -changes[place])[: count - 1])
    return [scanned[0], *(scanned[place] for place in starts)]


def _thumbnail(frame: Frames, side: int = 16) -> npt.NDArray[np.float64]:
    """Compute (side, side) mean brightness of squares, 0 to 1."""
    grey = frame.mean(axis=2) / 255
    rows, columns = (np.linspace(0, edge, min(side, edge) + 1).astype(int)[:-1] for edge in grey.shape)
    sums = np.add.reduceat(np.add.reduceat(grey, rows, axis=0), columns, axis=1)
    areas = np.outer(np.diff([*rows, grey.shape[0]]), np.diff([*columns, grey.shape[1]]))
    return np.asarray(sums / areas)


def _on_screen(times: Times, wanted: npt.NDArray[np.float64]) -> list[int]:
    # Times are rounded to the file's own clock: a frame due within a microsecond is on screen.
    found = np.searchsorted(times, wanted + 1e-6, side="right") - 1
    return sorted(set(found.clip(0, len(times) - 1).tolist()))
