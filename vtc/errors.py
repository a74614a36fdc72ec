"""Everything `vtc` raises on purpose.

Each message says what was asked, what was found and what to do. All of them are `ValueError`s, so that callers who do
not know this package can still catch them.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "InputError",
    "KernelError",
    "StateError",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "VtcError",
]


class VtcError(ValueError):
    """Base of all errors of this package."""


class ConfigError(VtcError):
    """An argument or option is unknown, missing, of the wrong type or out of range."""


class UnsupportedModelError(VtcError):
    """The model, or the way it is set up, is one that `vtc` cannot compress exactly."""


class UnsupportedMethodError(VtcError):
    """The method does not exist, or it needs something that this model cannot supply."""


class InputError(VtcError):
    """The data is broken: an unreadable image, NaN features, shapes that contradict each other, nothing at all."""


class KernelError(VtcError):
    """The implementation of an operation that was asked for by name cannot run here: no Triton, no GPU, no kernel."""


class StateError(VtcError):
    """The call makes no sense now: the model is not compressed, or there is nothing to report yet."""
