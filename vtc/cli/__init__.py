"""The `vtc` command.

A command is a module of this package with two functions: `add_arguments(parser)`, and `run(args)`, which returns the
exit status. Only the module of the command that is called is imported, and none imports torch, transformers, numpy or
PIL before `run`: help is printed, and mistakes in the arguments are reported, without loading them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import vtc
from vtc.console import finish

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS = {
    "ask": "answer a question about a picture, without and with compression",
    "inspect": "draw which parts of a picture a method keeps",
    "video": "answer questions about a video file, of any length, with compression",
    "calibrate": "fit a method's options to your own pictures and questions",
    "advise": "find the cheapest setting that keeps the answers to your own prompts",
    "train": "train the modules of a method on your own pictures and questions",
    "methods": "list the compression methods",
    "models": "list the supported model types",
    "convert": "write an original LLaVA checkpoint as one of transformers",
    "serve": "start vLLM's server with compression",
    "bench": "measure speed on this machine, with random weights",
}
"""Name, which is also that of the module, and what the command does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the command's name; `sys.argv` without them.

    Returns
    -------
    int
        Exit status: 0, or 2 for a mistake in the arguments or the input, a file that cannot be written or too little
        memory, reported on stderr in one line; 130 after an interruption.
    """
    given = sys.argv[1:] if argv is None else argv

    def work() -> int:
        args = build_parser(given).parse_args(given)
        status: int = args.run(args)
        return status

    return finish("vtc", work)


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of all commands, complete for those whose names occur in `argv`; the others have a help line only."""
    parser = argparse.ArgumentParser(prog="vtc", description="Visual-token compression for transformers models.")
    parser.add_argument("--version", action="version", version=f"vtc {vtc.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name in argv:
            module = importlib.import_module(f"vtc.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
