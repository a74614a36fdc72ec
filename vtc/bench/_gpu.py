"""Runs the parts of `vtc bench gpu` in processes of their own and writes what they find.

Nothing here touches the device, and PyTorch is not imported: a case that crashes, hangs or spoils its process costs
that case alone.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.bench import _gpu_tables
from vtc.bench._gpu_parts import MACHINE, PARTS, Part
from vtc.bench.timing import write_json
from vtc.errors import ConfigError, InputError
from vtc.files import check_writable, write_text

__all__ = ["Deadline", "Results", "run", "run_part", "run_side_by_side"]

_START_SECONDS = 180.0  # most until a process measures its first case: imports on a cold disk
_POLL_SECONDS = 0.1
_WORKER = "vtc.bench._gpu_worker"


class Results:
    """What was found, as gpu.json and gpu.md of a folder.

    Attributes
    ----------
    machine : dict
        Result of the part `MACHINE`.
    parts : dict
        Part to case to {"status", "seconds", "result" or "error"}.
    """

    def __init__(self, folder: Path) -> None:
        self.json, self.markdown = folder / "gpu.json", folder / "gpu.md"
        self.machine: dict[str, Any] = {}
        self.parts: dict[str, dict[str, Any]] = {}

    def resume(self, machine: dict[str, Any]) -> None:
        """Read an earlier run of the same machine and versions.

        Raises
        ------
        InputError
            The file is not one of this benchmark.
        ConfigError
            It is of another machine or other versions.
        """
        self.machine = machine
        if not self.json.is_file():
            return
        try:
            before = json.loads(self.json.read_text(encoding="utf-8"))
            earlier, self.parts = before["machine"], before["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.json}: not a result of vtc bench gpu; give another folder.") from error
        if earlier["conditions"] != machine["conditions"]:
            raise ConfigError(
                f"{self.json} was measured on another machine or with other versions; give another folder."
            )

    def done(self, part: str, case: str) -> bool:
        """Return whether a case has a result; one that failed is tried again."""
        return bool(self.parts.get(part, {}).get(case, {}).get("status") == "done")

    def add(self, part: str, case: str, entry: dict[str, Any]) -> None:
        """Take a case and write both files."""
        self.parts.setdefault(part, {})[case] = entry
        self.write()

    def write(self) -> None:
        """Write both files, each in full or not at all."""
        found = {"benchmark": "gpu", "machine": self.machine, "parts": self.parts}
        write_json(self.json, found)
        write_text(self.markdown, _gpu_tables.report(self.machine, self.parts))


def run(folder: Path, names: Sequence[str], device: str, budget: float, only: str | None = None) -> int:
    """Run the parts in their order and print where the results are; the status is 1 where a case failed."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    check_writable(results.json, results.markdown)
    machine = _machine(device, min(budget, MACHINE.limit))
    results.resume(machine["result"])
    results.write()
    small = machine["small"]
    chosen = [name for name in PARTS if name in names]
    cases = {name: [case for case in PARTS[name].of(small) if only is None or only in case] for name in chosen}
    if not any(cases.values()):
        raise ConfigError(f"--only {only}: no case of {', '.join(chosen)} has that in its name.")
    failed = 0
    for place, name in enumerate(chosen):
        open_cases = [case for case in cases[name] if not results.done(name, case)]
        left = budget - (time.monotonic() - began)
        share = PARTS[name].share / sum(PARTS[later].share for later in chosen[place:])
        print(f"{name}: {len(open_cases)} of {len(cases[name])} cases, at most {left * share:.0f} s", flush=True)
        until = Deadline(time.monotonic() + left * share)
        for case, entry in run_side_by_side(PARTS[name], open_cases, device, until, 1 if small else None):
            results.add(name, case, entry)
            failed += entry["status"] == "failed"
            print(f"  {case}: {entry['status']} in {entry['seconds']:.1f} s", flush=True)
    results.write()
    print(f"\n{results.markdown.read_text(encoding='utf-8')}\nWritten to {results.json} and {results.markdown}.")
    return 1 if failed else 0


def _machine(device: str, seconds: float) -> dict[str, Any]:
    """Run the part that tells what is measured on; without it nothing can be."""
    with _worker(MACHINE, MACHINE.cases, device) as worker:
        entry = worker.wait_for("end", time.monotonic() + seconds)
        if entry is None or entry["status"] == "failed":
            reason = worker.last_words() if entry is None else entry["error"].splitlines()[-1]
            raise ConfigError(f"--device {device}: nothing can be measured there: {reason}")
        return {**entry, "small": worker.small}


@dataclass
class Deadline:
    """When a part ends, in `time.monotonic`; an interruption brings it forward."""

    at: float


def run_side_by_side(
    part: Part, cases: Sequence[str], device: str, deadline: Deadline, processes: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do what `run_part` does, in as many processes side by side as the part says, or `processes`."""
    number = max(1, min(len(cases), processes or part.processes))
    found: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()

    def work(own: Sequence[str]) -> None:
        try:
            for item in run_part(part, own, device, deadline):
                found.put(item)
        finally:
            found.put(None)

    threads = [threading.Thread(target=work, args=(cases[first::number],)) for first in range(number)]
    for thread in threads:
        thread.start()
    try:
        working = number
        while working:
            item = found.get()
            working -= item is None
            if item is not None:
                yield item
    finally:
        deadline.at = -math.inf  # after an interruption they end what runs and start nothing
        for thread in threads:
            thread.join()


def run_part(part: Part, cases: Sequence[str], device: str, deadline: Deadline) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every case with its entry, in whatever number of processes that takes.

    Parameters
    ----------
    part : Part
    cases : sequence of str
    device : str
    deadline : Deadline
        Cases that have not begun by then are not started, and one that runs is ended.
    """
    left = list(cases)
    while left:
        if time.monotonic() >= deadline.at:
            for case in left:
                yield case, _entry("left out", error="the time budget had ended")
            return
        begun = 0
        with _worker(part, left, device) as worker:
            start = time.monotonic()
            for case in list(left):
                if worker.wait_for("begin", start + _START_SECONDS, deadline) is None:
                    break
                start = time.monotonic()
                end = worker.wait_for("end", start + part.limit, deadline)
                begun += 1
                left.remove(case)
                if end is None:
                    why = worker.last_words() if worker.ended() else f"no end within {time.monotonic() - start:.0f} s"
                    yield case, _entry("failed", time.monotonic() - start, error=why)
                    break
                yield case, {name: value for name, value in end.items() if name not in ("event", "case")}
                start = time.monotonic()
            why = worker.last_words()
        if not begun and time.monotonic() < deadline.at:  # it could not even start: neither can the others
            for case in left:
                yield case, _entry("failed", error=f"the process did not start: {why}")
            return


def _entry(status: str, seconds: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"status": status, "seconds": seconds, **more}


class _Worker:
    """A process that measures, and the events that it has told."""

    def __init__(self, process: subprocess.Popen[bytes], events: Path, output: Path) -> None:
        self.process, self.events, self.output = process, events, output
        self.small = True
        self._read = 0

    def wait_for(self, kind: str, limit: float, deadline: Deadline | None = None) -> dict[str, Any] | None:
        """Return the next event of a kind; None where the process, or the time, ended before."""
        while True:
            last = self.ended()  # before reading: what it told last must not be missed
            for event in self._next():
                if event["event"] == "ready":
                    self.small = event["small"]
                elif event["event"] == kind:
                    return event
            if last or time.monotonic() >= (limit if deadline is None else min(limit, deadline.at)):
                return None
            time.sleep(_POLL_SECONDS)

    def _next(self) -> Iterator[dict[str, Any]]:
        """Yield the events that were told since, one at a time, so that none is lost to who stops at it."""
        text = self.events.read_bytes()
        while (stop := text.find(b"\n", self._read)) >= 0:
            line, self._read = text[self._read : stop], stop + 1
            yield json.loads(line)

    def ended(self) -> bool:
        """Return whether the process is over."""
        return self.process.poll() is not None

    def last_words(self) -> str:
        """Describe how it ended, with the last of what it printed."""
        status = self.process.poll()
        how = "it runs" if status is None else f"ended by signal {-status}" if status < 0 else f"status {status}"
        printed = self.output.read_bytes().decode("utf-8", "replace").strip()
        return f"{how}: {printed[-1000:]}" if printed else how


@contextmanager
def _worker(part: Part, cases: Sequence[str], device: str) -> Iterator[_Worker]:
    """Start a process for the cases; it and all of its children are gone afterwards."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])  # a checkout need not be installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        events, output = Path(folder) / "events", Path(folder) / "output"
        events.touch()
        command = [sys.executable, "-m", _WORKER, part.module, str(events), device, *cases]
        with output.open("wb") as printed:
            process = subprocess.Popen(
                command, stdout=printed, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            yield _Worker(process, events, output)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # compilers that it started, too
            process.wait()
