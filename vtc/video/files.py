"""Frames of video files: opened by a decoder that can read them, read a window at a time."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from vtc.errors import ConfigError, InputError
from vtc.video.containers import announced_bytes, container

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "DECODERS",
    "Frames",
    "Times",
    "VideoFile",
    "VideoInfo",
]

Frames = npt.NDArray[np.uint8]
"""(T, H, W, 3)."""
Times = npt.NDArray[np.float64]
"""(N,) seconds from the first frame at which each frame is shown, ascending."""

DECODERS = ("decord", "av", "torchcodec")
"""In the order in which they are tried."""

_LONGEST = 1e7
"""Seconds, four months: a time beyond is a mistake of the decoder or the file."""

_MAY_LACK = 0.02
"""Share of a file that may be missing at its end: players show such files, and a frame at most is lost."""


@dataclass(frozen=True)
class VideoInfo:
    """Facts about an open video file.

    Attributes
    ----------
    path : Path
    decoder : str
        The one of `DECODERS` that reads it.
    frames : int
    fps : float
        Frames per second on average; where the rate varies, `VideoFile.times` says more.
    duration : float
        Seconds, the last frame's own time on screen included.
    width, height : int
        As shown, after rotation.
    """

    path: Path
    decoder: str
    frames: int
    fps: float
    duration: float
    width: int
    height: int


class _Decoder(Protocol):
    times: Times

    def read(self, indices: Sequence[int]) -> list[Frames]:
        """Frames (H, W, 3) at ascending indices; fewer where the file breaks off."""

    def close(self) -> None: ...


class VideoFile:
    """A video file, open until `close` or the end of a `with` block.

    Parameters
    ----------
    path : str or Path
    decoder : {"decord", "av", "torchcodec"}, optional
        Only this one; by default each that is installed is tried until one can read the file.

    Raises
    ------
    InputError
        The file cannot be read; the message names it and says why. Nothing stays open.
    ConfigError
        No decoder is installed, or there is none of that name.
    """

    def __init__(self, path: str | Path, decoder: str | None = None) -> None:
        self.path = Path(path)
        lacking = _look_at(self.path)
        self._decoder, name, first = _open(self.path, decoder, lacking)
        times = self._decoder.times
        self.times: Times = times - times[0]
        steps = np.diff(self.times)
        step = float(np.median(steps)) if len(steps) else 0.0
        duration = float(self.times[-1]) + step
        fps = len(self.times) / duration if duration > 0 else 0.0
        self.info = VideoInfo(self.path, name, len(self.times), fps, duration, first.shape[1], first.shape[0])

    def read(self, indices: Sequence[int]) -> Frames:
        """Read frames (T, H, W, 3) as RGB, upright, at ascending `indices`.

        Raises
        ------
        InputError
            The file breaks off before the last of them, has no such frame, or its frames change their size.
        """
        indices = [int(index) for index in indices]
        if not indices or indices[0] < 0 or indices[-1] >= len(self.times) or sorted(indices) != indices:
            raise InputError(f"{self.path}: frames 0 to {len(self.times) - 1} can be read, in ascending order.")
        try:
            frames = self._decoder.read(indices)
        except Exception as error:  # every decoder has a family of its own
            raise InputError(f"{self.path}: decoding fails near frame {indices[0]}: {_line(error)}.") from error
        if len(frames) < len(indices):
            missing = indices[len(frames)]
            raise InputError(
                f"{self.path}: decoding stops before frame {missing} of {len(self.times)} "
                f"({self.times[missing]:.2f} s): the file is cut off or damaged."
            )
        for index, frame in zip(indices, frames, strict=True):
            if frame.shape[:2] != (self.info.height, self.info.width):
                raise InputError(
                    f"{self.path}: frame {index} is {frame.shape[1]} x {frame.shape[0]} pixels, but the first is "
                    f"{self.info.width} x {self.info.height}: the file is damaged, or its size changes on the way."
                )
        return np.stack(frames)

    def windows(self, indices: Sequence[int], size: int) -> Iterator[Frames]:
        """Read the frames at `indices`, at most `size` in memory at a time."""
        for start in range(0, len(indices), size):
            yield self.read(indices[start : start + size])

    def pictures(self, times: Sequence[float], longest: int) -> list[Image]:
        """Read the frames shown at these ascending times, for drawing, with at most `longest` pixels along an edge.

        Few of them are in memory at full size at a time.
        """
        from PIL import Image as Pillow

        found = [max(0, int(place) - 1) for place in np.searchsorted(self.times, np.array(times) + 1e-6, side="right")]
        out = []
        for frames in self.windows(found, 16):
            for frame in frames:
                picture = Pillow.fromarray(frame)
                picture.thumbnail((longest, longest))
                out.append(picture)
        return out

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._decoder.close()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _look_at(path: Path) -> str | None:
    """Refuse what needs no decoder to be refused; says what is missing at the end of the file."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder, not a video file.")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty.")
        size, announced = path.stat().st_size, announced_bytes(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from error
    except ValueError as error:  # a null character
        raise InputError(f"{str(path)!r}: {error}.") from error
    if announced is None or size >= announced:
        return None
    message = f"it is cut off: {announced - size:,} of the {announced:,} bytes that it announces are not there"
    if announced - size > _MAY_LACK * announced:
        raise InputError(f"{path}: cannot be read as a video: {message}.")
    return message


def _open(path: Path, only: str | None, lacking: str | None) -> tuple[_Decoder, str, Frames]:
    """The first decoder that reads the file's first frame, and that frame."""
    if only is not None and only not in DECODERS:
        raise ConfigError(f"decoder must be one of {', '.join(DECODERS)}, got {only!r}.")
    names = [name for name in ([only] if only else DECODERS) if importlib.util.find_spec(name) is not None]
    if not names:
        package = only if only == "torchcodec" else '"vtc[video]"'  # which the extra does not bring
        raise ConfigError(f"Reading videos needs {only or 'a decoder'}: pip install {package}.")
    reasons: dict[str, str] = {}
    unusable: dict[str, str] = {}
    for name in names:
        decoder: _Decoder | None = None
        try:
            decoder = _CLASSES[name](path)
            times = decoder.times
            if not len(times):
                raise InputError("the video stream has no frames")
            if not np.isfinite(times).all() or np.ptp(times) > _LONGEST or (np.diff(times) < 0).any():
                raise InputError("the times of its frames make no sense")
            frames = decoder.read([0])
            if not frames:
                raise InputError("not one frame can be decoded")
            return decoder, name, frames[0]
        except (ConfigError, ImportError) as error:
            unusable[name] = _line(error)
        except Exception as error:  # every decoder has a family of its own
            if decoder is not None:
                decoder.close()
            reasons[name] = _line(error)
    if not reasons:
        raise ConfigError("; ".join(f"{name} cannot be used: {text}" for name, text in unusable.items()) + ".")
    # All decoders say the same in other words, and PyAV says it best.
    reason = lacking or reasons.get("av") or "; ".join(f"{name}: {text}" for name, text in reasons.items())
    raise InputError(f"{path}: cannot be read as a video: {reason}.")


def _line(error: BaseException) -> str:
    message = getattr(error, "strerror", None) or str(error)  # without the number and the name of the file
    message = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", message.lstrip())  # where in decord's sources it happened, and when
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


# ------------------------------------------------------------------------------------------------------- decoders


class _Decord:
    """decord: frames by number. It knows no AV1, and not every size of turned pictures."""

    def __init__(self, path: Path) -> None:
        decord = importlib.import_module("decord")
        with path.open("rb") as file:
            if container(file.read(12)) is None:  # found wrong without a word: transport streams, WMV
                raise InputError("it finds frames by number in MP4, QuickTime, Matroska, WebM and AVI files only")
        decord.logging.set_level(decord.logging.QUIET)
        self._reader: Any = decord.VideoReader(str(path), num_threads=1)
        count = len(self._reader)
        shown = self._reader.get_frame_timestamp(np.arange(count)) if count else np.zeros((0, 2))
        self.times: Times = np.asarray(shown, dtype=np.float64)[:, 0]

    def read(self, indices: Sequence[int]) -> list[Frames]:
        return list(self._reader.get_batch(list(indices)).asnumpy())

    def close(self) -> None:
        self._reader = None  # which closes the file


class _Av:
    """PyAV: frames in order, from the key frame before the first that is wanted."""

    # Decoding this many frames is cheaper than seeking back to a key frame.
    _NEAR = 96

    def __init__(self, path: Path) -> None:
        self._av, self._path = importlib.import_module("av"), path
        self._frames: Iterator[Any] = iter(())
        self._next = -1
        self._open()
        try:
            if not self._container.streams.video:
                kinds = sorted({stream.type for stream in self._container.streams})
                raise InputError(f"it has no video stream, only {', '.join(kinds)}" if kinds else "it has no streams")
            self._pts = self._read_pts()
        except BaseException:
            self._container.close()
            raise
        self.times: Times = np.array(self._pts, dtype=np.float64) * float(self._stream.time_base)

    def _open(self) -> None:
        self._container: Any = self._av.open(str(self._path))
        self._stream: Any = next(iter(self._container.streams.video), None)
        if self._stream is not None:
            self._stream.thread_type = "AUTO"

    def _read_pts(self) -> list[int]:
        """Return when each frame is shown, in units of the stream, without decoding."""
        packets = [packet for packet in self._container.demux(self._stream) if packet.size]
        pts = sorted({packet.pts for packet in packets if packet.pts is not None})
        if len(pts) * 2 < len(packets):  # containers that store decoding times only
            self._rewind()
            pts = sorted({frame.pts for frame in self._frames if frame.pts is not None})
        return pts

    def _rewind(self) -> None:
        """Go to the first frame. Some containers cannot seek there, but every file can be opened again."""
        self._container.close()
        self._open()
        self._frames = self._container.decode(self._stream)

    def _seek(self, pts: int) -> None:
        """Go to a frame at `pts` or before; a seek without an index may go too far, and is repeated."""
        second = max(1, round(1 / self._stream.time_base))
        back = 0
        while pts - back > self._pts[0]:
            self._container.seek(pts - back, stream=self._stream, backward=True, any_frame=False)
            frames = self._container.decode(self._stream)
            first = next((frame for frame in frames if frame.pts is not None), None)
            if first is not None and first.pts <= pts:
                self._frames = itertools.chain([first], frames)
                return
            back = max(second, 2 * back)
        self._rewind()

    def read(self, indices: Sequence[int]) -> list[Frames]:
        if not self._next <= indices[0] <= self._next + self._NEAR or self._next < 0:
            self._seek(self._pts[indices[0]])
        out: list[Frames] = []
        for frame in self._frames:
            # A frame that cannot be decoded is stood for by the next one.
            while frame.pts is not None and len(out) < len(indices) and frame.pts >= self._pts[indices[len(out)]]:
                out.append(self._upright(frame))
            if len(out) == len(indices):
                break
        self._next = indices[-1] + 1 if len(out) == len(indices) else -1
        return out

    def _upright(self, frame: Any) -> Frames:
        turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))

    def close(self) -> None:
        self._frames = iter(())
        self._container.close()


class _TorchCodec:
    """torchcodec: frames by number."""

    # Places at which a constant rate is checked, and frames decoded at a time where it is not one.
    _CHECKED, _AT_ONCE = 16, 32

    def __init__(self, path: Path) -> None:
        decoders = importlib.import_module("torchcodec.decoders")
        try:
            self._reader: Any = decoders.VideoDecoder(str(path), seek_mode="exact", dimension_order="NHWC")
        except RuntimeError as error:
            if "Could not load libtorchcodec" in str(error):
                raise ConfigError("it needs the shared libraries of FFmpeg, which are not installed") from error
            raise
        self.times: Times = self._read_times()

    def _read_times(self) -> Times:
        """Return all times. They come with decoded frames only, so a constant rate is assumed and checked at a few."""
        metadata = self._reader.metadata
        count = int(metadata.num_frames or 0)
        if not count:
            return np.zeros(0)
        steps = np.arange(count) / float(metadata.average_fps)
        places = sorted({round(place) for place in np.linspace(0, count - 1, self._CHECKED)})
        shown = self._shown(places)
        if np.abs(shown - shown[0] - steps[places]).max() < 0.5 / float(metadata.average_fps):
            return steps
        starts = range(0, count, self._AT_ONCE)
        return np.concatenate([self._shown(range(s, min(s + self._AT_ONCE, count))) for s in starts])

    def _shown(self, indices: Sequence[int]) -> Times:
        return np.asarray(self._reader.get_frames_at(indices=list(indices)).pts_seconds, dtype=np.float64)

    def read(self, indices: Sequence[int]) -> list[Frames]:
        return list(self._reader.get_frames_at(indices=list(indices)).data.numpy())

    def close(self) -> None:
        self._reader = None


_CLASSES: dict[str, Any] = {"decord": _Decord, "av": _Av, "torchcodec": _TorchCodec}
