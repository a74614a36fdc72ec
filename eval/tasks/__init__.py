"""Tasks: where images, videos, questions and answers come from."""

from __future__ import annotations

from eval.tasks import generated, mmbench, mme, pope, scienceqa, short_answers, vqa  # noqa: F401  # they register tasks
from eval.tasks.base import Media, Sample, Task, get_task, names, register_task

__all__ = ["Media", "Sample", "Task", "get_task", "names", "register_task"]
