"""The work of `vtc bench serve`: one server on the loopback address, bounded loads, and what its clients see."""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import io
import json
import math
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vtc.bench.timing import conditions, describe, markdown_table, write_json
from vtc.errors import StateError

__all__ = ["free_port", "run", "server"]

_START_SECONDS = 600
_END_SECONDS = 60
_REQUEST_SECONDS = 300


def run(args: argparse.Namespace) -> int:
    """Measure every ratio at every concurrency on one server."""
    cells = []
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with server(_command(args, port), address):
        _ask(address, args, 0, args.keep_ratio[0])  # the first request compiles and fills caches of the processor
        blocks, size = _cache_of(address)
        seed = 1
        for concurrency in args.concurrency:
            for ratio in args.keep_ratio:
                cells.append(_cell(address, args, concurrency, ratio, seed) | {"keep_ratio": ratio})
                seed += args.requests
    for cell in cells:
        cell["kv_blocks"] = math.ceil((cell["prompt_tokens"] + args.new_tokens) / size)
        cell["fit"] = blocks // cell["kv_blocks"]
    header = ("at a time", "kept", "prompt", "KV blocks", "fit", "first token, median", "requests / s")
    rows = [
        (
            str(cell["concurrency"]),
            f"{cell['keep_ratio']:.0%}",
            str(cell["prompt_tokens"]),
            str(cell["kv_blocks"]),
            str(cell["fit"]),
            f"{1e3 * cell['first_token_median']:.0f} ms",
            f"{cell['requests_per_second']:.2f}",
        )
        for cell in cells
    ]
    given = {name: getattr(args, name) for name in ("method", "requests", "new_tokens", "side")}
    stated = conditions(**given, blocks=blocks, block_size=size, server=_versions())
    print(markdown_table(header, rows))
    print(describe(stated))
    if args.json:
        write_json(args.json, {"conditions": stated, "cells": cells})
    return 0


def _versions() -> dict[str, str]:
    """Return the version of vLLM, under whatever name it is distributed."""
    found = importlib.metadata.packages_distributions().get("vllm", [])
    return {name: importlib.metadata.version(name) for name in found}


def _command(args: argparse.Namespace, port: int) -> list[str]:
    """Return the command line of vLLM's server on a port of the loopback address."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.checkpoint]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m", "--trust-request-mm-kwargs"]
    return [*command, *shlex.split(args.vllm)]


def free_port() -> int:
    """Return a port of the loopback address that nobody listens to now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(command: Sequence[str], address: str) -> Iterator[None]:
    """Start a server in a process group of its own and wait until it answers; end the group behind the block.

    SIGTERM and SIGHUP, which would end this process on the spot, end the server first: they leave the block as an
    exception does, with the exit status that a shell gives to such a process. They only do so in the main thread.

    Raises
    ------
    StateError
        The server ended, or took too long to answer.
    """
    with tempfile.TemporaryDirectory() as folder, _signals_raise():
        log = Path(folder) / "log.txt"
        with log.open("w") as out:
            process = subprocess.Popen([*command], stdout=out, stderr=out, start_new_session=True)
        try:
            ends = time.monotonic() + _START_SECONDS
            while not _answers(address):
                if process.poll() is not None or time.monotonic() > ends:
                    raise StateError(f"vLLM's server did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.5)
            yield
        finally:
            _end(process)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let signals that end this process raise SystemExit while entered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    found = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group, in the end by force."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_END_SECONDS)
    finally:
        with suppress(ProcessLookupError):  # what is left of the group, or all of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
        return True
    return False


def _cache_of(address: str) -> tuple[int, int]:
    """Return how many blocks the KV cache has, and how many tokens a block holds."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    line = next(line for line in text.splitlines() if line.startswith("vllm:cache_config_info"))
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
    return int(labels["num_gpu_blocks"]), int(labels["block_size"])


def _cell(address: str, args: argparse.Namespace, concurrency: int, ratio: float, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda number: _ask(address, args, seed + number, ratio), range(args.requests)))
    seconds = time.perf_counter() - began
    first = sorted(answer["first"] for answer in answers)
    return {
        "concurrency": concurrency,
        "requests": args.requests,
        "seconds": seconds,
        "requests_per_second": args.requests / seconds,
        "first_token_median": statistics.median(first),
        "first_token_90": first[math.ceil(0.9 * len(first)) - 1],
        "prompt_tokens": answers[0]["prompt_tokens"],
    }


def _ask(address: str, args: argparse.Namespace, seed: int, ratio: float) -> dict[str, Any]:
    """Send one request with a picture of its own; return the seconds to the first token, and the prompt's length."""
    content = [
        {"type": "image_url", "image_url": {"url": _picture(seed, args.side)}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": args.new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "mm_processor_kwargs": {"vtc_method": args.method, "vtc_keep_ratio": ratio},
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began, first, tokens = time.perf_counter(), None, 0
    with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line.removeprefix(b"data: "))
            if first is None and any(choice["delta"].get("content") for choice in piece["choices"]):
                first = time.perf_counter() - began
            tokens = (piece.get("usage") or {}).get("prompt_tokens", tokens)
    return {"first": time.perf_counter() - began if first is None else first, "prompt_tokens": tokens}


def _picture(seed: int, side: int) -> str:
    """Return a picture of noise as the address of its own data."""
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((side, side)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
