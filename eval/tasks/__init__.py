"""Tasks: where images, videos, questions and answers come from."""

from __future__ import annotations

from eval.tasks import generated  # noqa: F401  # registers its task
from eval.tasks.base import Sample, Task, get_task, names, register_task

__all__ = ["Sample", "Task", "get_task", "names", "register_task"]
