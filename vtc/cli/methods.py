"""`vtc methods`: list the compression methods."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vtc import registry
from vtc.cli.tables import print_table

if TYPE_CHECKING:
    from vtc.core.context import Stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments."""


def run(_: argparse.Namespace) -> int:
    """Print the table."""
    rows = []
    for name, cls in registry.selectors().items():
        stages = cls().stages()
        needs = sorted({need.value for stage in stages for need in stage.requires})
        rows.append((name, where(stages), ", ".join(needs) or "-", cls.paper))
    print_table(("method", "where", "needs besides features", "from"), rows)
    return 0


def where(stages: Sequence[Stage]) -> str:
    """Where a method of these stages drops tokens, in words."""
    layers = [str(stage.layer) for stage in stages if stage.layer is not None]
    before = ["before the language model"] if len(layers) < len(stages) else []
    inside = [f"entering decoder layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"] if layers else []
    return " and ".join(before + inside)
