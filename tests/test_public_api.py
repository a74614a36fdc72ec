"""The public names and their signatures, as a file: a change of either is seen in the diff and meant."""

from __future__ import annotations

import inspect
from pathlib import Path

import vtc

SNAPSHOT = Path(__file__).with_name("public_api.txt")


def public_api() -> str:
    """One line per public name: constants bare, functions and classes with their parameters' names and defaults."""
    lines = []
    for name in sorted(vtc.__all__):
        item = getattr(vtc, name)
        if isinstance(item, type) and issubclass(item, Exception):
            lines.append(f"{name}({', '.join(base.__name__ for base in item.__bases__)})")
        elif callable(item) and not (isinstance(item, type) and hasattr(item, "__members__")):
            parameters = [
                parameter.replace(annotation=inspect.Parameter.empty)
                for parameter in inspect.signature(item).parameters.values()
            ]
            lines.append(f"{name}{inspect.Signature(parameters)}")
        elif hasattr(item, "__members__"):
            lines.append(f"{name}: {', '.join(item.__members__)}")
        else:
            lines.append(name)
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_are_as_written_down() -> None:
    written = SNAPSHOT.read_text(encoding="utf-8")
    assert public_api() == written, (
        "the public API changed. If it is meant, write it down with "
        "`python -m tests.test_public_api` and say so in CHANGELOG.md"
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api(), encoding="utf-8")
