"""`vtc serve`: start vLLM's server with compression."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

from vtc.cli.arguments import add_budget, add_method, add_seed, configuration
from vtc.config import DEFAULT_METHOD
from vtc.errors import InputError, StateError

_SERVER = "vllm.entrypoints.openai.api_server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("checkpoint", help="folder of a checkpoint, or its name on a hub that vLLM can reach")
    add_method(parser, DEFAULT_METHOD, "--option", line=True)
    add_budget(parser, of="a picture or video")
    add_seed(parser)
    parser.add_argument(
        "--vllm",
        default="",
        metavar="ARGUMENTS",
        help="further arguments of vLLM's server in one text, such as --vllm='--port 8001 --max-model-len 4096'",
    )
    parser.add_argument("--print", action="store_true", help="print the command line and start nothing")
    parser.epilog = "Needs vLLM, in an environment of its own: docs/serving.md."
    parser.set_defaults(at=None)


def run(args: argparse.Namespace) -> int:
    """Print what is started, and become it."""
    from vtc.integrations.vllm.settings import environment_of, planned

    config = configuration(args, seed=args.seed)
    planned(config)
    _check_checkpoint(args.checkpoint)
    try:
        further = shlex.split(args.vllm)
    except ValueError as error:
        raise InputError(f"--vllm {args.vllm!r}: {error}.") from error
    command = [sys.executable, "-m", _SERVER, "--model", args.checkpoint, *further]
    variables = environment_of(config)
    print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)]))
    if not args.print:
        _become(command, variables)
    return 0


def _become(command: list[str], variables: dict[str, str]) -> None:
    """Go on as another program, which signals then reach."""
    if importlib.util.find_spec("vllm") is None:
        raise StateError("vLLM is not installed here; docs/serving.md says how to make an environment with it.")
    sys.stdout.flush()
    os.execve(command[0], command, os.environ | variables)


def _check_checkpoint(checkpoint: str) -> None:
    """Refuse a folder whose architecture is not covered, before vLLM loads it."""
    from vtc.integrations.vllm.families import check_architecture

    file = Path(checkpoint) / "config.json"
    if not file.is_file():
        if Path(checkpoint).is_dir():
            raise InputError(f"{checkpoint}: this folder has no config.json, so it is no checkpoint.")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: not the configuration of a model: {error}.") from error
    for architecture in found:
        check_architecture(architecture)
