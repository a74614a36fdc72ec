"""ATP-LLaVA: at a few decoder layers every image keeps the tokens above its own thresholds."""

from __future__ import annotations

from .method import (
    AtpSelector,
    ModalityAttention,
    TextValues,
    load_modules,
    mean_logits,
    redundancy_score,
    soft_mask,
    spatial_score,
)
from .module import AtpModule, AtpModules, following_the_plan
from .training import Study, begin, loss, multiples, needs, study

__all__ = [
    "AtpModule",
    "AtpModules",
    "AtpSelector",
    "ModalityAttention",
    "Study",
    "TextValues",
    "begin",
    "following_the_plan",
    "load_modules",
    "loss",
    "mean_logits",
    "multiples",
    "needs",
    "redundancy_score",
    "soft_mask",
    "spatial_score",
    "study",
]
