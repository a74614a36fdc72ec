"""`vtc methods`: list the compression methods."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vtc import registry
from vtc.cli.tables import print_table

if TYPE_CHECKING:
    from vtc.core.stage import Stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments."""


def run(_: argparse.Namespace) -> int:
    """Print the table."""
    rows = []
    for name, cls in registry.selectors().items():
        stages = cls().stages()
        needs = sorted({signal.name for stage in stages for signal in stage.requires})
        rows.append((name, where(stages), ", ".join(needs) or "-", cls.paper))
    print_table(("method", "where", "needs besides features", "from"), rows)
    return 0


def where(stages: Sequence[Stage]) -> str:
    """Say in words where a method of these stages drops tokens."""
    from vtc.core.sites import CacheAfterPrefill, DecoderLayer

    if all(isinstance(stage.site, CacheAfterPrefill) for stage in stages):
        return "in the caches, after the prefill"
    layers = [str(stage.site.layer) for stage in stages if isinstance(stage.site, DecoderLayer)]
    before = ["before the language model"] if len(layers) < len(stages) else []
    inside = [f"entering decoder layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"] if layers else []
    return " and ".join(before + inside)
