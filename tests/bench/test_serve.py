"""`vtc bench serve` never leaves a server behind; a stub stands for vLLM's."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vtc.bench import _serve
from vtc.errors import StateError

STUB = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as vLLM has its engine
open(sys.argv[2], "w").write(str(child.pid))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STUB

USER = """
import sys, time
from vtc.bench import _serve
_serve._END_SECONDS = 1
with _serve.server(sys.argv[2:], f"http://127.0.0.1:{sys.argv[1]}"):
    print("serving", flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    ends = time.monotonic() + 20
    while alive(pid) and time.monotonic() < ends:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the table of processes in /proc")
@pytest.mark.parametrize("code", [STUB, STUBBORN], ids=["obeys", "ignores"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda each: each.name)
def test_a_signal_ends_the_server_with_all_its_processes(code: str, number: signal.Signals, tmp_path: Path) -> None:
    stub, noted, port = tmp_path / "stub.py", tmp_path / "child", _serve.free_port()
    stub.write_text(code, encoding="utf-8")
    command = [sys.executable, str(stub), str(port), str(noted)]
    # A process that is started in the background may ignore SIGINT.
    obey = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    user = subprocess.Popen([sys.executable, "-c", obey + USER, str(port), *command], stdout=subprocess.PIPE, text=True)
    try:
        assert user.stdout is not None
        assert user.stdout.readline() == "serving\n"
        child = int(noted.read_text())
        assert alive(child)
        user.send_signal(number)
        status = user.wait(timeout=60)
        assert status == (-number if number is signal.SIGINT else 128 + number)
        assert gone(child)
        assert not _serve._answers(f"http://127.0.0.1:{port}")
    finally:
        user.kill()
        user.wait()


def test_a_server_that_does_not_start_is_quoted() -> None:
    before = signal.getsignal(signal.SIGTERM)
    failing = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(StateError, match="did not start:\nno such model"),
        _serve.server(failing, f"http://127.0.0.1:{_serve.free_port()}"),
    ):
        pass
    assert signal.getsignal(signal.SIGTERM) is before
