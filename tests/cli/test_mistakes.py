"""No mistake of a user, no full disk and no interruption ends a command with a traceback, or leaves half a file."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vtc
from vtc import chat, console, reference
from vtc.cli import main
from vtc.errors import InputError

ROOT = Path(__file__).parents[2]
needs_model = pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a picture, samples and a folder."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), (200, 30, 30)).save("ok.png")
    (tmp_path / "folder").mkdir()
    sample = json.dumps({"image": "ok.png", "question": "What is there?"})
    (tmp_path / "samples.jsonl").write_text(f"{sample}\n" * 2)
    return tmp_path


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with one line, which is returned."""

    def run(*argv: Any) -> str:
        before = sorted(folder.rglob("*"))
        capsys.readouterr()
        assert main([*map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"vtc: error: [^\n]+\n", error), error
        assert sorted(folder.rglob("*")) == before, "nothing is left behind"
        return error

    return run


# ----------------------------------------------------------------------------------------------------------- arguments


@needs_model
@pytest.mark.parametrize("question", ["<image>", "What is <image> ?", "\udcff"])
def test_questions_that_are_no_words(refused: Callable[..., str], question: str) -> None:
    for command in (["ask", "ok.png", question], ["inspect", "ok.png", "--question", question]):
        assert "The question" in refused(*command)
    Path("samples.jsonl").write_text(json.dumps({"image": "ok.png", "question": question}))
    message = refused("advise", "samples.jsonl", "--methods", "random", "--keep-ratios", "0.5")
    assert "The question" in message
    assert "sample 0" in message


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("fastv", "layer=[[["),
        ("fastv", "layer=" + "9" * 5000),
        ("fastv", "layer=" + "[" * 500 + "]" * 500),
        ("fastv", "layer=" + "[" * 100_000),
        ("fastv", "name=2"),
        ("atp", "layers=true"),
        ("todre", "pivot={}"),
        ("vtc-cls", 'score_source={"a": {}}'),
        ("vidcom2", "temperature=null"),
        ("uniform", "\udcff=1"),
    ],
    ids=range(10),
)
def test_options_of_the_wrong_type(refused: Callable[..., str], method: str, option: str) -> None:
    assert option.partition("=")[0].encode("ascii", "backslashreplace").decode() in refused(
        "ask", "ok.png", "what?", "--method", method, "-o", option
    )


@pytest.mark.parametrize("device", ["meta", "", "nonsense", "cpu:-1", "9" * 30])
def test_devices_are_refused_before_a_model_is_loaded(refused: Callable[..., str], device: str) -> None:
    assert f"--device {device}" in refused("ask", "ok.png", "what?", "--model", "nowhere", "--device", device)
    assert f"--device {device}" in refused("bench", "overhead", "--device", device)
    assert f"--device {device}" in refused("bench", "kernels", "--device", device)


@pytest.mark.parametrize("name", ["layers", "visual-tokens", "text-tokens", "steps", "repeats"])
def test_benches_measure_something(refused: Callable[..., str], name: str) -> None:
    assert f"--{name} must be an integer from 1 to " in refused("bench", "overhead", f"--{name}=0")


@pytest.mark.parametrize("argument", ["--keep-ratio=nan", "--method=divprun"])
def test_benches_refuse_settings_before_they_build_a_model(refused: Callable[..., str], argument: str) -> None:
    refused("bench", "overhead", argument)
    refused("bench", "prefill", argument)


@pytest.mark.parametrize(
    "line",
    [
        b'{"image": "a\\u0000b", "question": "x"}',
        b"[" * 100_000,
        b'{"image": "ok.png", "question": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"image": ' + b"9" * 5000 + b', "question": "x"}',
        b'{"image": 1, "question": "x"}',
        b'{"image": "ok.png", "question": {"a": 1}}',
        b'{"image": "ok.png", "video": "x", "question": "x"}',
        b"\0\0",
        b"3",
    ],
    ids=range(9),
)
def test_lines_that_are_no_samples(refused: Callable[..., str], line: bytes) -> None:
    Path("bad.jsonl").write_bytes(b"\n" + line + b"\n")
    for command in (["advise", "bad.jsonl"], ["calibrate", "bad.jsonl", "--keep-ratio", "0.5", "-o", "c.json"]):
        assert "bad.jsonl, line 2: expected" in refused(*command)


def test_files_of_samples_that_cannot_be_read(refused: Callable[..., str]) -> None:
    Path("bad.jsonl").write_bytes(b"\xff\xfe\n")
    assert "utf-8" in refused("advise", "bad.jsonl")
    assert "Is a directory" in refused("advise", "folder")
    assert "No such file" in refused("advise", "gone.jsonl")


def test_a_separator_of_lines_inside_of_a_question_ends_no_line(folder: Path) -> None:
    from vtc.cli.samples import _lines

    (folder / "s.jsonl").write_text('{"image": "ok.png", "question": "a\u2028b"}\n', encoding="utf-8")
    assert [more["question"] for _, _, more in _lines(folder / "s.jsonl")] == ["a\u2028b"]


def test_a_checkpoint_that_raises_anything_is_named(folder: Path, refused: Callable[..., str]) -> None:
    for content in ("[" * 100_000, '{"model_type": "llava", "text_config": 3}', '{"model_type": ["llava"]}'):
        (folder / "folder" / "config.json").write_text(content)
        assert "folder: cannot be loaded" in refused("ask", "ok.png", "what?", "--model", "folder")


# ------------------------------------------------------------------------------------------------------------- outputs

OUTPUTS = {
    "calibrate -o": ["calibrate", "samples.jsonl", "--keep-ratio", "0.5", "-o"],
    "calibrate --plot": ["calibrate", "samples.jsonl", "--keep-ratio", "0.5", "-o", "config.json", "--plot"],
    "calibrate --storage": ["calibrate", "samples.jsonl", "--keep-ratio", "0.5", "-o", "config.json", "--storage"],
    "advise": ["advise", "samples.jsonl", "-o"],
    "bench overhead": ["bench", "overhead", "--json"],
    "bench prefill": ["bench", "prefill", "--json"],
    "bench kernels": ["bench", "kernels", "--json"],
    "bench kernels --plot": ["bench", "kernels", "--growth", "--plot"],
}
PLACES = {
    "folder": "this is a folder",
    "gone/out": "the folder gone does not exist",
    "ok.png/out": "Not a directory",
    "x" * 300: "File name too long",
    "/proc/out": "no file can be written there",
    "/dev/full": "No space left on device",
}


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_refused_before_anything_is_loaded(
    name: str, place: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if place.startswith("/") and not Path(place).parent.is_dir():
        pytest.skip("this system has no such folder")
    monkeypatch.setattr("vtc.cli.arguments.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert PLACES[place] in refused(*OUTPUTS[name], place)


def test_two_outputs_have_two_names(refused: Callable[..., str]) -> None:
    assert "is to be written twice" in refused(*OUTPUTS["calibrate --plot"], "./config.json")


def test_pictures_are_not_written_into_folders(refused: Callable[..., str], folder: Path) -> None:
    (folder / "folder.png").mkdir()
    for place in ("folder.png", "gone/k.png", "ok.png/k.png"):
        refused("inspect", "ok.png", "-o", place)


FIT = ["calibrate", "samples.jsonl", "--keep-ratio", "0.5", "--method", "aim", "--trials", "1", "-o", "config.json"]
SMALL = ["--steps", "1", "--repeats", "1", "--warmup", "0", "--layers", "1", "--visual-tokens", "576"]
WRITERS: dict[str, tuple[list[str], str]] = {
    "inspect": (["inspect", "ok.png", "-o", "out.png"], "out.png"),
    "advise": (["advise", "samples.jsonl", "-o", "out.json"], "out.json"),
    "calibrate": (FIT, "config.json"),
    "calibrate --plot": ([*FIT, "--plot", "out.png"], "out.png"),
    "bench overhead": (["bench", "overhead", *SMALL, "--json", "out.json"], "out.json"),
}


@needs_model
@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from /proc")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("before", [None, b"earlier"])
def test_a_full_disk_leaves_no_half_a_file(
    name: str, before: bytes | None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, output = WRITERS[name]
    if before is not None:
        Path(output).write_bytes(before)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(Path(output).suffix):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    class Advice:
        chosen = None
        stages = (vtc.CompressionConfig("random", keep_ratio=0.5),)

    known = {*map(str, Path().iterdir())}
    monkeypatch.setattr(vtc, "advise", lambda *_, **__: Advice())
    monkeypatch.setattr(os, "fsync", full)
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"vtc: error: {output}: No space left on device"
    kept = {"config.json"} if name == "calibrate --plot" else set()
    assert {*map(str, Path().iterdir())} == known | kept, "what was found is there without its picture"
    assert before is None or Path(output).read_bytes() == before


# ---------------------------------------------------------------------------------------------- interruptions, resuming


@needs_model
def test_an_interrupted_calibration_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    command = [*FIT, "--trials", "400", "--storage", "trials.log"]
    storage = folder / "trials.log"

    def finished() -> int:
        return storage.read_text().count('"state":1') if storage.exists() else 0

    with subprocess.Popen(
        [sys.executable, "-m", "vtc.cli", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.time() + 500
        while finished() < 3 and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert said[-1] == "vtc: interrupted"
    assert not any("Traceback" in line for line in said)
    assert not (folder / "config.json").exists()
    done = finished()
    assert 3 <= done < 400
    with storage.open("a") as file:
        file.write('{"op_code":6,"trial_i')  # what a kill in the middle of a line leaves
    command[command.index("400")] = str(done + 1)
    assert main(command) == 0
    assert finished() == done + 1, "what was tried is not tried again"
    assert vtc.CompressionConfig.load("config.json").method == "aim"
    assert main(command) == 0, "the file is whole"


@needs_model
@pytest.mark.parametrize("content", [b"notes\n", b"{}\n", b"[1]\n", b"\xff\n", b"[" * 100_000 + b"\n"], ids=range(5))
def test_a_file_that_holds_no_trials_is_left_alone(refused: Callable[..., str], folder: Path, content: bytes) -> None:
    (folder / "notes.txt").write_bytes(content)
    assert "notes.txt, line 1: this is no file of trials" in refused(*FIT, "--storage", "notes.txt")
    assert (folder / "notes.txt").read_bytes() == content


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "vtc: interrupted"),
        (PermissionError(errno.EACCES, "Permission denied", "there"), 2, "vtc: error: there: Permission denied"),
        (OSError("of a library\nin two lines"), 2, "vtc: error: of a library in two lines"),
        (MemoryError(), 2, "vtc: error: not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "vtc: error: not enough memory: CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "vtc: error: not enough memory: Default"),
        (InputError("two\nlines"), 2, "vtc: error: two lines"),
    ],
)
def test_how_a_command_ends(error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise error

    assert console.finish("vtc", work) == status
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug"), KeyError("a bug")])
def test_faults_of_the_program_keep_their_traceback(error: Exception) -> None:
    def work() -> int:
        raise error

    with pytest.raises(type(error), match="a bug"):
        console.finish("vtc", work)


def test_names_that_a_terminal_cannot_show_are_printed(folder: Path) -> None:
    code = "import sys; from vtc.console import finish; sys.exit(finish('x', lambda: print('\\udcff \u00d7')))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\\udcff \\xd7\n", "")


def test_what_a_processor_does_not_take_is_named() -> None:
    class Processor:
        chat_template = "x"
        image_token = "<image>"

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "prompt"

        def __call__(self, **_: Any) -> None:
            raise RuntimeError("mean must have 1 elements")

    picture = Image.new("RGB", (3000, 1))
    with pytest.raises(InputError, match="Processor does not take a picture of 3000x1 pixels: mean must have 1 elem"):
        chat.image_inputs(Processor(), [picture], "what?")
    with pytest.raises(InputError, match="A question is a text, got 3"):
        chat.image_inputs(Processor(), [picture], 3)  # type: ignore[arg-type]
    Processor.chat_template = ""
    with pytest.raises(InputError, match="has no chat template"):
        chat.image_inputs(Processor(), [picture], "what?")
