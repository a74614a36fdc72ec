"""Video files: whatever can be read is read right, whatever cannot says which file and why, and nothing stays open."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import vtc
from tests.video import clips
from vtc.video.containers import announced_bytes
from vtc.video.files import DECODERS, VideoFile
from vtc.video.sampling import (
    check_sampling,
    sample_by_count,
    sample_by_default,
    sample_by_fps,
    sample_by_scenes,
)

INSTALLED = [name for name in DECODERS if importlib.util.find_spec(name) is not None]


def open_files() -> set[str]:
    """What this process has open below the temporary folder."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the listing's own
            continue
    return {link for link in links if "pytest" in link}


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> Path:
    return clips.write(tmp_path_factory.mktemp("clips") / "clip.mp4", clips.frames(15))


@pytest.mark.parametrize("decoder", INSTALLED)
def test_frames_come_as_they_were_written(clip: Path, decoder: str) -> None:
    with VideoFile(clip, decoder) as video:
        assert (video.info.frames, video.info.width, video.info.height) == (15, 64, 48)
        assert video.info.fps == pytest.approx(10, rel=0.01)
        assert video.info.duration == pytest.approx(1.5, rel=0.01)
        assert video.times.tolist() == pytest.approx([i / 10 for i in range(15)], abs=1e-3)
        assert video.info.decoder == decoder
        frames = video.read(range(15))
        assert frames.shape == (15, 48, 64, 3)
        assert frames.dtype == np.uint8
        assert [clips.number(frame) for frame in frames] == list(range(15))
        assert frames[0][5, 5].mean() > 200  # upper left
        # Back, far ahead, one by one, twice the same.
        for wanted in ([3], [14], [0, 7, 13], [4, 5], [5]):
            assert [clips.number(frame) for frame in video.read(wanted)] == wanted
        batches = list(video.windows([1, 4, 9, 12, 14], 2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert [clips.number(frame) for batch in batches for frame in batch] == [1, 4, 9, 12, 14]
        with pytest.raises(vtc.InputError, match="frames 0 to 14"):
            video.read([15])
        with pytest.raises(vtc.InputError, match="ascending"):
            video.read([3, 2])
        video.close()
        video.close()


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("size", [(65, 49), (66, 34), (37, 64)], ids=str)
def test_odd_sizes(tmp_path: Path, decoder: str, size: tuple[int, int]) -> None:
    path = clips.write(tmp_path / "odd.avi", clips.frames(4, *size), codec="ffv1", pix_fmt="bgr0")
    with VideoFile(path, decoder) as video:
        frames = video.read(range(4))
        assert frames.shape == (4, size[1], size[0], 3)
        assert [clips.number(frame) for frame in frames] == [0, 1, 2, 3]


@pytest.mark.parametrize("decoder", INSTALLED)
def test_one_frame(tmp_path: Path, decoder: str) -> None:
    path = clips.write(tmp_path / "one.mp4", clips.frames(1))
    with VideoFile(path, decoder) as video:
        assert video.times.tolist() == [0.0]
        assert video.read([0]).shape == (1, 48, 64, 3)
        assert sample_by_fps(video.times, video.info.duration, 1.0) == [0]
        assert sample_by_count(video.times, video.info.duration, 8) == [0]
        assert sample_by_scenes(video) == [0]


@pytest.mark.parametrize("decoder", [None, *(name for name in INSTALLED if name != "decord")])
def test_a_turned_video_is_shown_upright(tmp_path: Path, decoder: str | None) -> None:
    path = clips.turned(clips.write(tmp_path / "turned.mp4", clips.frames(3)))  # decord cannot turn this size
    with VideoFile(path, decoder) as video:
        frames = video.read([0, 1, 2])
        assert frames.shape == (3, 64, 48, 3)
        assert (video.info.width, video.info.height) == (48, 64)
        # What was up on the left is up on the right after a quarter turn clockwise.
        assert frames[0][5, -5].mean() > 200
        assert frames[0][5, 5].mean() < 60


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize(("turns", "corner"), [(1, (5, -5)), (2, (-5, -5)), (3, (-5, 5))])
def test_every_turn_is_undone(tmp_path: Path, decoder: str, turns: int, corner: tuple[int, int]) -> None:
    path = clips.turned(clips.write(tmp_path / "turned.mp4", clips.frames(3, 128, 64)), turns)
    with VideoFile(path, decoder) as video:
        frame = video.read([0])[0]
        assert frame.shape == ((64, 128, 3) if turns == 2 else (128, 64, 3))
        assert (video.info.height, video.info.width) == frame.shape[:2]
        bright = [at for at in ((5, 5), (5, -5), (-5, -5), (-5, 5)) if frame[at].mean() > 200]
        assert bright == [corner]


@pytest.mark.parametrize("decoder", INSTALLED)
def test_a_variable_rate_keeps_its_times(tmp_path: Path, decoder: str) -> None:
    times = [0.0, 0.1, 0.2, 0.3, 2.0, 2.1, 4.0]
    path = clips.write(tmp_path / "variable.mkv", clips.frames(7), times=times)
    with VideoFile(path, decoder) as video:
        assert video.times.tolist() == pytest.approx(times, abs=2e-3)
        # On screen at 0, 1, 2, 3 and 4 seconds; frame 3 stays until 2.0 and frame 5 until 4.0.
        wanted = sample_by_fps(video.times, video.info.duration, 1.0)
        assert wanted == [0, 3, 4, 5, 6]
        assert [clips.number(frame) for frame in video.read(wanted)] == wanted


def test_times_that_make_no_sense_are_left_to_another_decoder(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As decord has said of the first frames of a program stream.
    monkeypatch.setattr(
        "vtc.video.files._Decord.__init__", lambda self, path: setattr(self, "times", np.array([-1e14, 0.0]))
    )
    with VideoFile(clip) as video:
        assert video.info.decoder == "av"
    with pytest.raises(vtc.InputError, match="decord: the times of its frames make no sense"):
        VideoFile(clip, "decord")


def test_what_decord_cannot_read_is_read_by_another(tmp_path: Path) -> None:
    import av

    if "libsvtav1" not in av.codecs_available and "libaom-av1" not in av.codecs_available:
        pytest.skip("this build of PyAV cannot write AV1")
    codec = "libsvtav1" if "libsvtav1" in av.codecs_available else "libaom-av1"
    path = clips.write(tmp_path / "av1.mp4", clips.frames(5, 64, 64), codec=codec)
    with VideoFile(path) as video:
        assert video.info.decoder == "av"
        assert [clips.number(frame) for frame in video.read(range(5))] == list(range(5))


def test_sound_beside_the_pictures_does_not_matter(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "sound.mp4", clips.frames(5), sound=True)
    with VideoFile(path) as video:
        assert len(video.times) == 5


# ------------------------------------------------------------------------------------------------------ broken files


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name to (path, what the message must say)."""
    whole = clips.write(folder / "whole.mp4", clips.frames(30, 128, 96))
    data = whole.read_bytes()
    cut = folder / "cut.mp4"
    cut.write_bytes(data[: len(data) // 2])
    text = folder / "text.mp4"
    text.write_text("this is no video\n" * 50)
    empty = folder / "empty.mp4"
    empty.touch()
    nothing = clips.write(folder / "nothing.avi", [])
    bare = folder / "bare.mp4"
    bare.write_bytes(struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 512) + struct.pack(">I4s", 8, b"moov"))
    return {
        "missing": (folder / "missing.mp4", "no such file"),
        "folder": (folder, "a folder, not a video"),
        "empty": (empty, "the file is empty"),
        "text": (text, "cannot be read as a video"),
        "cut": (cut, "cannot be read as a video: it is cut off"),
        "sound": (clips.write_sound(folder / "sound.m4a"), "no video stream, only audio"),
        "nothing": (nothing, "cannot be read as a video"),
        "bare": (bare, "it has no streams"),
    }


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut", "sound", "nothing", "bare"])
@pytest.mark.parametrize("decoder", [None, *INSTALLED])
def test_broken_files_are_named_with_the_cause(tmp_path: Path, kind: str, decoder: str | None) -> None:
    path, cause = broken(tmp_path)[kind]
    before = open_files()
    with pytest.raises(vtc.InputError) as error:
        VideoFile(path, decoder)
    assert str(path) in str(error.value)
    assert ".cc:" not in str(error.value)
    if decoder in (None, "av"):
        assert cause in str(error.value)
    assert open_files() <= before


def test_a_path_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(vtc.InputError, match=r"'a\\x00b\.mp4': .*null"):
        VideoFile("a\0b.mp4")


CONTAINERS = {
    "index last.mp4": ("mpeg4", {}),
    "index first.mp4": ("mpeg4", {"movflags": "faststart"}),
    "quicktime.mov": ("mpeg4", {}),
    "matroska.mkv": ("mpeg4", {}),
    "web.webm": ("libvpx", {}),
    "riff.avi": ("mpeg4", {}),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("decoder", [None, *INSTALLED])
def test_a_file_that_breaks_off_says_so(tmp_path: Path, name: str, decoder: str | None) -> None:
    codec, options = CONTAINERS[name]
    whole = clips.write(tmp_path / name, clips.frames(60, 128, 96), codec=codec, fps=25, **options)
    data = whole.read_bytes()
    assert announced_bytes(whole) == len(data)
    with VideoFile(whole, decoder) as video:
        assert video.info.frames == 60
    path = tmp_path / f"cut {name}"
    path.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(vtc.InputError, match=rf"cut {name}: cannot be read as a video: it is cut off: [\d,]+ of the"):
        VideoFile(path, decoder)


def test_a_few_lacking_bytes_do_not_matter(tmp_path: Path) -> None:
    whole = clips.write(tmp_path / "whole.mkv", clips.frames(60, 128, 96), fps=25)
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole.read_bytes()[:-30])
    with VideoFile(path) as video:
        assert video.info.frames >= 59


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("cut.ts", "mpeg2video", {}), ("cut.mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"})],
    ids=["transport stream", "fragments"],
)
def test_streams_without_a_length_are_read_to_their_end(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    path = clips.write(tmp_path / name, clips.frames(60, 128, 96), codec=codec, fps=25, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with VideoFile(path) as video:
        assert 20 < video.info.frames < 60
        frames = video.read(range(video.info.frames))
    assert [clips.number(frame) for frame in frames] == [number % 18 for number in range(len(frames))]


@pytest.mark.parametrize(
    ("data", "announced"),
    [
        (b"", None),
        (b"\x1aE\xdf\xa3", None),
        (b"\x1aE\xdf\xa3\x82xx\x18S\x80g\x81y", 13),
        (b"\x1aE\xdf\xa3\x82xx\x18S\x80g\x40\x20y", 45),
        (b"\x1aE\xdf\xa3\x82xx\x18S\x80g\xffyyyy", None),  # live: no length
        (b"\0\0\0\x08free\0\0\0\x01mdat\0\0\0\0\0\0\0\x20", 40),
        (b"\0\0\0\x08free\0\0\0\0mdatxxxx", None),  # to the end of the file
        (b"RIFF\x20\0\0\0AVI xx", 40),
        (b"RIFF\0\0\0\0AVI xx", None),
        (b"RIFF\x20\0\0\0WAVExx", None),
        (b"any text at all", None),
    ],
)
def test_lengths_are_read_from_the_head(tmp_path: Path, data: bytes, announced: int | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    assert announced_bytes(path) == announced


def test_pictures_are_small_and_on_time(clip: Path) -> None:
    with VideoFile(clip) as video:
        shown = video.pictures([0.0, 0.3, 0.35, 1.4, 9.0], 32)
    assert {picture.size for picture in shown} == {(32, 24)}
    assert [clips.number(np.asarray(picture)) for picture in shown] == [0, 3, 3, 14, 14]


def test_frames_that_cannot_be_decoded_are_told(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VideoFile(clip) as video:
        read = video._decoder.read
        monkeypatch.setattr(video._decoder, "read", lambda indices: read(indices)[:2])
        with pytest.raises(vtc.InputError, match=r"clip\.mp4: decoding stops before frame 7 of 15 \(0\.70 s\)"):
            video.read([1, 4, 7, 9])

        def broken(indices: Any) -> Any:
            raise RuntimeError("bad packet")

        monkeypatch.setattr(video._decoder, "read", broken)
        with pytest.raises(vtc.InputError, match="decoding fails near frame 1: bad packet"):
            video.read([1])


def test_a_decoder_must_be_known_and_there(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(vtc.ConfigError, match="decoder must be one of"):
        VideoFile(clip, "vlc")
    monkeypatch.setattr("vtc.video.files.importlib.util.find_spec", lambda name: None)
    with pytest.raises(vtc.ConfigError, match=r"vtc\[video\]"):
        VideoFile(clip)


def test_a_decoder_that_does_not_load_is_not_the_fault_of_the_file(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class VideoDecoder:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("Could not load libtorchcodec. Likely causes:\n 1. FFmpeg is not properly installed")

    module = ModuleType("torchcodec.decoders")
    module.VideoDecoder = VideoDecoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    monkeypatch.setattr("vtc.video.files.importlib.util.find_spec", lambda name: name)
    with pytest.raises(vtc.ConfigError, match="torchcodec cannot be used: it needs the shared libraries of FFmpeg"):
        VideoFile(clip, "torchcodec")
    text = clip.with_name("text.mp4")
    text.write_text("no video")
    with pytest.raises(vtc.InputError, match=r"text\.mp4: cannot be read as a video: Invalid data found"):
        VideoFile(text)


# ---------------------------------------------------------------------------------------------------------- sampling


def test_sampling_by_rate_and_by_count() -> None:
    times = np.arange(100) / 10
    assert sample_by_fps(times, 10.0, 1.0) == list(range(0, 100, 10))
    assert sample_by_fps(times, 10.0, 0.3) == [0, 33, 66]
    assert sample_by_fps(times, 10.0, 1000.0) == list(range(100))
    assert sample_by_count(times, 10.0, 4) == [12, 37, 62, 87]
    assert sample_by_count(times, 10.0, 1) == [50]
    assert sample_by_count(times, 10.0, 100) == sample_by_count(times, 10.0, 1000) == list(range(100))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(vtc.ConfigError, match="fps must be positive"):
            sample_by_fps(times, 10.0, bad)
    with pytest.raises(vtc.ConfigError, match="1 or more"):
        sample_by_count(times, 10.0, 0)


def test_a_short_clip_is_looked_at_with_8_frames() -> None:
    for count in range(1, 9):
        assert sample_by_default(np.arange(count) / 4, count / 4) == list(range(count)), "all that there are"
    assert sample_by_default(np.arange(16) / 4, 4.0) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert len(sample_by_default(np.arange(190) / 25, 7.6)) == 8
    long = np.arange(250) / 25
    assert sample_by_default(long, 10.0) == sample_by_fps(long, 10.0, 1.0) == list(range(0, 250, 25))
    # Twenty frames in one second, the last of which stands still for four.
    picked = sample_by_default(np.arange(20) / 20, 5.0)
    assert picked == sorted(set(picked))
    assert len(picked) == 8
    assert 0 <= picked[0] <= picked[-1] < 20


def test_absurd_samplings_are_refused() -> None:
    check_sampling(None, None, None)
    check_sampling(1000, None, None)
    check_sampling(None, 100_000, 0.5)
    for fps in (0, -1.0, 1e9, 10**5000, float("nan"), float("inf"), "1", True):
        with pytest.raises(vtc.ConfigError, match=r"fps must be positive, and at most 1,000 frames per second, got"):
            check_sampling(fps, None, None)  # type: ignore[arg-type]
    for frames in (0, -1, 10**9, 2.0, True):
        with pytest.raises(vtc.ConfigError, match="frames must be an integer from 1 to 100,000, got"):
            check_sampling(None, frames, None)  # type: ignore[arg-type]
    for scenes in (0.0, 1.0, float("nan")):
        with pytest.raises(vtc.ConfigError, match="between 0 and 1"):
            check_sampling(None, None, scenes)


def test_sampling_by_scenes(tmp_path: Path) -> None:
    first, second, third = (np.full((48, 64, 3), level, dtype=np.uint8) for level in (30, 200, 90))
    shown = [first] * 8 + [second] * 6 + [third] * 10
    path = clips.write(tmp_path / "scenes.mp4", shown)
    with VideoFile(path) as video:
        assert sample_by_scenes(video, fps=10.0) == [0, 8, 14]
        assert sample_by_scenes(video, fps=10.0, window=3) == [0, 8, 14]
        assert sample_by_scenes(video, fps=10.0, count=2) == [0, 8]  # the largest change
        assert sample_by_scenes(video, 0.6, fps=10.0) == [0, 8]
        with pytest.raises(vtc.ConfigError, match="between 0 and 1"):
            sample_by_scenes(video, 1.0)


def test_frames_that_change_their_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clips.write(tmp_path / "clip.mp4", clips.frames(3))
    with vtc.video.VideoFile(path) as file:
        first, *others = list(file.read([0, 1, 2]))
        monkeypatch.setattr(file._decoder, "read", lambda indices: [first, others[0][:-2], others[1]])
        with pytest.raises(vtc.InputError, match=r"clip\.mp4: frame 1 is 64 x 46 pixels, but the first is 64 x 48"):
            file.read([0, 1, 2])
