"""`vtc inspect` and `vtc video` as commands, and what they share with `vtc ask`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vtc
import vtc.reference
from tests import tiny
from tests.tiny_processors import processor
from tests.video import clips
from vtc.cli import arguments as shared
from vtc.cli import main


@pytest.mark.skipif(not vtc.reference.available(), reason="vtc-reference is not installed")
def test_inspect_draws_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "kept.png"
    sample = str(vtc.reference.samples()[6])
    assert (
        main(["inspect", sample, "--method", "fastv", "--keep-ratio", "0.25", "-o", str(output), "--size", "200"]) == 0
    )
    assert "fastv(keep_ratio=0.25) on llava" in capsys.readouterr().out
    with Image.open(output) as drawn:
        assert drawn.size == (2 * 200 + 6, 200 + 20)  # before and behind the layer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "missing.png: no such file"),
        (["."], ".: a folder, not a picture"),
        (["SAMPLE", "--method", "nothing"], "Unknown method"),
        (["SAMPLE", "-o", "kept.txt"], "kept.txt: the picture is written as .png"),
        (["SAMPLE", "--size", "100000"], "--size must be an integer from 16 to 4,096, got 100000"),
        (["SAMPLE", "--size", "0"], "--size must be an integer from 16 to 4,096, got 0"),
        (["SAMPLE", "-o", "nowhere/kept.png"], "the folder nowhere does not exist"),
    ],
)
def test_inspect_tells_mistakes_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("sample.png")
    assert main(["inspect", *["sample.png" if argument == "SAMPLE" else argument for argument in arguments]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vtc: error:")
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.build("qwen2_5_vl_video").model, processor("qwen2_5_vl_video")
    monkeypatch.setattr("vtc.cli.arguments.load_model", lambda *_: made)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return clips.write(tmp_path / "clip.mp4", clips.frames(8), fps=4)


@pytest.mark.parametrize(
    ("given", "loaded"),
    [([], "reference:qwen2_5_vl"), (["--model", "reference:llava"], "reference:llava"), (["--model", "x"], "x")],
)
def test_video_asks_the_reference_model_for_videos(
    given: list[str], loaded: str, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(name: str, *_: str) -> Any:
        raise vtc.InputError(name)

    monkeypatch.setattr("vtc.cli.arguments.load_model", load)
    assert main(["video", str(clip), "what ?", *given]) == 2
    assert capsys.readouterr().err == f"vtc: error: {loaded}\n"


def test_video_finds_the_modules_that_ship_with_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    clip = str(vtc.reference.clips()[0])
    asked = ["video", clip, "what ?", "--method", "vtc-asked", "--keep-tokens", "9", "--max-new-tokens", "1"]
    assert main(asked) == 0
    assert "9 of 256" in capsys.readouterr().out


@pytest.mark.usefixtures("model")
def test_video_answers_and_draws(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "kept.gif"
    asked = [str(clip), "what happens ?", "a b ?", "--fps", "4", "--keep-ratio", "0.5", "--max-new-tokens", "3"]
    assert main(["video", *asked, "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "what happens ?" in printed
    assert re.search(r"8 frames, \d+ of \d+ visual tokens \(50\.0 %\) in 1 window\n", printed)
    assert "re-used: features, compressed KV prefix" in printed
    with Image.open(output) as drawn:
        assert drawn.n_frames > 1
    assert main(["video", *asked, "--json", "--window", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question"] for line in lines] == ["what happens ?", "a b ?"]
    assert [window[0] for window in lines[0]["windows"]] == [4, 4]


def test_mistakes_are_told_before_a_model_is_loaded(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtc.cli.arguments.load_model", lambda *_: pytest.fail("a model was loaded"))
    photo, samples = tmp_path / "photo.png", tmp_path / "samples.jsonl"
    Image.new("RGB", (8, 8)).save(photo)
    samples.write_text(json.dumps({"image": str(photo), "question": "?"}))
    most = "1000000000"
    output = ["-o", str(tmp_path / "config.json")]
    for command in (
        ["inspect", str(photo), "--size", most],
        ["ask", str(photo), "?", "--max-new-tokens", most],
        *(["video", str(clip), "?", flag, most] for flag in ("--fps", "--frames", "--window", "--max-new-tokens")),
        ["video", str(clip), "?", "--per-window", "-3"],
        ["video", str(clip), "?", "--scenes", most],
        *(["advise", str(samples), flag, most] for flag in ("--frames", "--rounds", "--max-new-tokens")),
        *(["train", name, "--data", str(samples), *output] for name in ("divprune", "zzz")),
        *(
            ["train", "llava-mini", "--data", str(samples), *output, flag, "0"]
            for flag in ("--steps", "--batch", "--rate")
        ),
        *(["calibrate", str(samples), "--keep-ratio", "0.5", *output, flag, most] for flag in ("--frames", "--trials")),
    ):
        assert main(command) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert re.fullmatch(r"vtc: error: .+\n", printed.err)


def test_a_picture_that_no_file_holds_is_told(tmp_path: Path) -> None:
    with pytest.raises(vtc.InputError, match=r"kept\.webp: a picture of 17000 x 1 cannot be written: .*16,383"):
        shared.save(Image.new("RGB", (17_000, 1)), tmp_path / "kept.webp")
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4", "?"], "missing.mp4: no such file"),
        (["text.mp4", "?"], "text.mp4: cannot be read as a video"),
        (["CLIP", "?", "--fps", "0"], "fps must be positive"),
        (["CLIP", "?", "--fps", "-1"], "fps must be positive"),
        (["CLIP", "?", "--fps", "nan"], "fps must be positive"),
        (["CLIP", "?", "--fps", "inf"], "fps must be positive"),
        (["CLIP", "?", "--fps", "1e9"], "at most 1,000 frames per second, got 1000000000.0"),
        (["CLIP", "?", "--frames", "0"], "frames must be an integer from 1 to 100,000, got 0"),
        (["CLIP", "?", "--frames", "1000000000"], "frames must be an integer from 1 to 100,000"),
        (["CLIP", "?", "--scenes", "nan"], "between 0 and 1, got nan"),
        (["CLIP", "?", "--scenes", "2"], "between 0 and 1, got 2.0"),
        (["CLIP", "?", "--window", "0"], "--window must be an integer from 1 to 100,000, got 0"),
        (["CLIP", "?", "--window", "1000000000"], "--window must be an integer from 1 to 100,000"),
        (["CLIP", "?", "--max-new-tokens", "0"], "--max-new-tokens must be an integer from 1 to 100,000, got 0"),
        (["CLIP", "?", "--max-new-tokens", "1000000000"], "--max-new-tokens must be an integer from 1 to 100,000"),
        (["CLIP", "?", "--per-window", "0"], "per_window must be at least 1"),
        (["CLIP", "?", "--per-frame", "-1"], "per_frame must be at least 1"),
        (["CLIP", "?", "--keep-ratio", "nan"], "keep_ratio"),
        (["CLIP", "?", "--fps", "1", "--frames", "3"], "Give fps, or frames"),
        (["CLIP", "?", "--decoder", "vlc"], "decoder must be one of"),
        (["CLIP", "?", "--method", "fastv", "--per-frame", "3"], "must see the whole video at once"),
        (["CLIP", "?", "-o", "kept.mp4"], "the picture is written as"),
    ],
)
def test_video_tells_mistakes_in_a_line(
    arguments: list[str], message: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("no video")
    assert main(["video", *[str(clip) if argument == "CLIP" else argument for argument in arguments]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vtc: error:")
    assert message in error


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("command", "target"),
    [
        (["ask", "SAMPLE", "what ?"], "CompressionConfig"),
        (["inspect", "SAMPLE"], "CompressionConfig"),
        (["video", "CLIP", "what ?"], "VideoQAPipeline"),
    ],
)
def test_site_is_passed_on_where_it_is_given(
    command: list[str], target: str, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []

    def refuse(*_: Any, **arguments: Any) -> None:
        received.append(arguments)
        raise vtc.InputError("enough")

    monkeypatch.setattr(vtc, target, refuse)
    command = [str(clip) if argument == "CLIP" else argument for argument in command]
    assert [main(command), main([*command, "--at", "decoder:2"])] == [2, 2]
    without, given = received
    assert "at" not in without
    assert given == {**without, "at": "decoder:2"}
