"""`vtc models`: list the supported model types."""

from __future__ import annotations

import argparse

from vtc import registry
from vtc.cli.tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments."""


def run(_: argparse.Namespace) -> int:
    """Print the table."""
    rows = [
        (
            model_type,
            ", ".join(adapter.modalities),
            "refused" if adapter.decoder_stages_refused else "yes",
        )
        for model_type, adapter in registry.adapters().items()
    ]
    print_table(("config.model_type", "inputs", "decoder stages"), rows)
    return 0
