"""The operations that methods share, as plain functions.

`reference` is the specification: plain PyTorch, any device. Callers import from here, so that a faster implementation
can be put underneath without touching a method.
"""

from __future__ import annotations

from .reference import farthest_point, topk_indices

__all__ = ["farthest_point", "topk_indices"]
