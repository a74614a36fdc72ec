"""The `vtc` command."""

from vtc.cli.app import main

__all__ = ["main"]
