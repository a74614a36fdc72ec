"""Commands interrupted from the keyboard: one line, status 130, no half-written file, and they go on later."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vtc
import vtc.reference
from tests.fuzz.campaign import COUNTS, ROOT, watched
from tests.video import clips

LONGEST = 300.0


@dataclass(frozen=True)
class Command:
    """A command line in a folder of its own, the files it writes, and how long it usually takes."""

    name: str
    arguments: tuple[str, ...]
    writes: tuple[str, ...] = ()
    seconds: float = 5.0


_VTC = (sys.executable, "-m", "vtc.cli")
_SWEEP = (
    sys.executable,
    "-m",
    "eval",
    "sweep",
    "--task",
    "scenes",
    "--limit",
    "6",
    "--methods",
    "uniform",
    "--keep",
    "0.25",
)
COMMANDS = (
    Command("ask", (*_VTC, "ask", "picture.png", "What is left of the cup?", "--max-new-tokens", "4")),
    Command("inspect", (*_VTC, "inspect", "picture.png", "-o", "kept.png"), ("kept.png",)),
    Command("video", (*_VTC, "video", "clip.mp4", "What?", "--max-new-tokens", "4", "-o", "kept.gif"), ("kept.gif",)),
    Command(
        "calibrate",
        (
            *_VTC,
            "calibrate",
            "samples.jsonl",
            "--keep-ratio",
            "0.25",
            "--trials",
            "3",
            "--storage",
            "study.db",
            "-o",
            "best.json",
        ),
        ("best.json",),
    ),
    Command("sweep", (*_SWEEP, "--timed", "0", "--out", "swept"), ("swept/table.csv", "swept/table.md"), 12),
)


def prepare(folder: Path) -> None:
    """The files that the commands read."""
    samples = vtc.reference.samples()
    (folder / "picture.png").write_bytes(Path(samples[0]).read_bytes())
    lines = [
        {"image": "picture.png", "question": "What is left of the cup?"},
        {"image": "picture.png", "question": "Which?"},
    ]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    clips.write(folder / "clip.mp4", clips.frames(8), fps=4)


def run(command: Command, folder: Path, *, interrupt_after: float | None = None) -> tuple[int, str]:
    """Status and stderr; interrupted after so many seconds if the command still runs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command.arguments, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        if interrupt_after is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=interrupt_after)
            process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{command.name}: does not end after an interrupt") from None
    return process.returncode, errors


def whole(path: Path) -> bool:
    """Whether a written file can be read to its end."""
    if path.suffix == ".json":
        vtc.CompressionConfig.load(path)
    elif path.suffix in (".png", ".gif"):
        with Image.open(path) as image:
            for frame in range(getattr(image, "n_frames", 1)):
                image.seek(frame)
                np.asarray(image)
    else:
        return path.read_text(encoding="utf-8").endswith("\n")
    return True


def check_interrupt(command: Command, folder: Path, after: float) -> bool:
    """Interrupt a command once; whether it came to that."""
    COUNTS["faults"] += 1
    status, errors = run(command, folder, interrupt_after=after)
    for name in command.writes:
        assert not (folder / name).exists() or whole(folder / name), f"{command.name}: {name} is half written"
    if status == 0:
        return False
    if status == -signal.SIGINT and after < 1:
        return True  # the interpreter itself was starting
    if command.name == "sweep" and "eval/__main__.py" in errors and ", in main" not in errors:
        return True  # `python -m eval` loads torch, which takes seconds, before anything can catch an interrupt
    assert "Traceback" not in errors, f"{command.name}: a traceback after an interrupt: {errors}"
    if status == -signal.SIGINT and all((folder / name).exists() for name in command.writes):
        return True  # the interpreter itself was ending: it gives signals back to the system before it ends
    said = [line for line in errors.splitlines() if "interrupted" in line]
    # An interrupt that passes a library's own interpreter call makes Python end by the signal, also when it was caught;
    # shells call both 130.
    assert status in (130, -signal.SIGINT), f"{command.name}: status {status} after an interrupt"
    assert len(said) == 1, f"{command.name}: {len(said)} lines of an interrupt on stderr"
    assert errors.splitlines()[-1] == said[0], f"{command.name}: says more after an interrupt: {errors}"
    return True


def rows(path: Path) -> list[Any]:
    """Rows of a sweep, without what differs from run to run: head line and times."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "identity" not in row:
            found.append(
                {key: value for key, value in row.items() if not key.endswith(("_ms", "_s", "seconds", "time"))}
            )
    return sorted(found, key=lambda row: json.dumps(row, sort_keys=True))


def check_sweep_goes_on(folder: Path, seed: int, interrupts: int = 3) -> None:
    """A sweep that was interrupted several times ends with the rows of one that was not."""
    command, draw = COMMANDS[-1], random.Random(seed)
    one, several = folder / "one", folder / "several"
    for place in (one, several):
        place.mkdir(exist_ok=True)
    assert run(command, one)[0] == 0, "sweep: fails"
    for _ in range(interrupts):
        run(command, several, interrupt_after=draw.uniform(3, command.seconds))
    assert run(command, several)[0] == 0, "sweep: does not go on"
    assert rows(several / "swept" / "rows.jsonl") == rows(one / "swept" / "rows.jsonl"), (
        "sweep: goes on with other rows"
    )


def trials(path: Path) -> list[tuple[dict[str, float], float | None]]:
    """Settings and value of every trial that a calibration has ended, in order."""
    found: dict[int, dict[str, float]] = {}
    ended: dict[int, float | None] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        entry = json.loads(line)
        if entry["op_code"] == 5:
            found.setdefault(entry["trial_id"], {})[entry["param_name"]] = entry["param_value_internal"]
        elif entry["op_code"] == 6 and entry["state"] in (1, 2):  # complete, or a combination that is not possible
            ended[entry["trial_id"]] = (entry["values"] or [None])[0]
    return [(found[number], value) for number, value in sorted(ended.items())]


def check_calibration_goes_on(folder: Path, seed: int, interrupts: int = 3) -> None:
    """A calibration that was interrupted keeps its trials, and ends with as many as one that was not.

    Behind an interrupt others are tried: what is drawn depends on how many trials there are.
    """
    (command,) = [known for known in COMMANDS if known.name == "calibrate"]
    many = ["80" if word == "3" else word for word in command.arguments]
    command, draw = dataclasses.replace(command, arguments=tuple(many)), random.Random(seed)
    one, several = folder / "one", folder / "several"
    for place in (one, several):
        place.mkdir(exist_ok=True)
        prepare(place)
    assert run(command, one)[0] == 0, "calibrate: fails"
    before: list[Any] = []
    for number in range(interrupts):
        check_interrupt(command, several, draw.uniform(3, command.seconds + 2))
        now = trials(several / "study.db")
        assert now[: len(before)] == before, "calibrate: an interrupt changes earlier trials"
        if number == 0:
            assert now == trials(one / "study.db")[: len(now)], "calibrate: an interrupted one tries something else"
        before = now
    assert run(command, several)[0] == 0, "calibrate: does not go on"
    assert trials(several / "study.db")[: len(before)] == before, "calibrate: going on changes earlier trials"
    assert len(trials(several / "study.db")) == 80, "calibrate: goes on with another number of trials"
    assert whole(several / "best.json")


def explore(seed: int) -> None:
    """One interrupt of every command at a random time."""
    draw = random.Random(seed)
    command = draw.choice(COMMANDS)
    with tempfile.TemporaryDirectory() as name, watched():
        prepare(Path(name))
        if command.name == "sweep" and draw.random() < 0.3:
            check_sweep_goes_on(Path(name), seed)
        elif command.name == "calibrate" and draw.random() < 0.3:
            check_calibration_goes_on(Path(name), seed)
        else:
            after = draw.uniform(0.2, command.seconds)
            try:
                check_interrupt(command, Path(name), after)
            except AssertionError as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(f"{' '.join(command.arguments)}, interrupted after {after:.2f} s")
                raise
