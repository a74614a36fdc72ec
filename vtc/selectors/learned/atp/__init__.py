"""ATP-LLaVA: at a few decoder layers every image keeps the tokens above its own thresholds."""

from __future__ import annotations

from .method import (
    AtpSelector,
    ModalityAttention,
    load_modules,
    mean_logits,
    redundancy_score,
    soft_mask,
    spatial_score,
)
from .module import AtpModule, AtpModules
from .training import begin

__all__ = [
    "AtpModule",
    "AtpModules",
    "AtpSelector",
    "ModalityAttention",
    "begin",
    "load_modules",
    "mean_logits",
    "redundancy_score",
    "soft_mask",
    "spatial_score",
]
