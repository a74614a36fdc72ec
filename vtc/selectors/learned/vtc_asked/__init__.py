"""`vtc` that reads the question: a small scorer says what the decoder will look at."""

from __future__ import annotations

from .method import VtcAskedSelector
from .module import Scorer
from .training import begin, loss, study

__all__ = ["Scorer", "VtcAskedSelector", "begin", "loss", "study"]
