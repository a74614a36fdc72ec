"""The version of this package: one constant, and the lookup that prefers what is installed."""

from __future__ import annotations

import importlib.metadata

__version__ = "0.1.0"


def package_version() -> str:
    """Version of the installed distribution, or `__version__` in a checkout that was never installed."""
    try:
        return importlib.metadata.version("vtc")
    except importlib.metadata.PackageNotFoundError:
        return __version__
