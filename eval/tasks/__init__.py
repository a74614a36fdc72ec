"""Tasks: where images, videos, questions and answers come from."""

from __future__ import annotations

from eval.tasks import (  # noqa: F401  # importing them registers their tasks
    benchmarks,
    descriptions,
    files,
    generated,
    hard,
    long,
    several,
)
from eval.tasks.base import Media, Sample, Task, get_task, names, register_task

__all__ = ["Media", "Sample", "Task", "get_task", "names", "register_task"]
