"""Tasks: where images, videos, questions and answers come from."""

from __future__ import annotations

from eval.tasks import (  # noqa: F401  # they register tasks
    ai2d,
    easyvqa,
    egoschema,
    files,
    generated,
    longvideobench,
    mlvu,
    mmbench,
    mme,
    mmstar,
    mmvet,
    mvbench,
    nextqa,
    ocrbench,
    perceptiontest,
    photos,
    pope,
    scienceqa,
    seedbench,
    short_answers,
    videomme,
    vqa,
)
from eval.tasks.base import Media, Sample, Task, get_task, names, register_task

__all__ = ["Media", "Sample", "Task", "get_task", "names", "register_task"]
