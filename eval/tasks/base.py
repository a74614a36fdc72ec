"""The interface of a task: samples from files on disk, a prompt for each, and the scoring of an answer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

import vtc
from eval.tasks.video import Frames

Picture = Path | Callable[[], Any]
"""An image file, or a function that returns the image: one stored in a table, or one that is drawn."""


class Media(NamedTuple):
    """The decoded images and video of a sample."""

    images: list[Image.Image]
    video: Frames | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """One question.

    Attributes
    ----------
    id : str
        Unique within the task, the same in every evaluation.
    question : str
        The whole prompt text, the benchmark's instruction included.
    images : tuple of Path or callable
        Opened lazily.
    video : callable or None
        Returns the frames to show, decoded lazily: an `eval.tasks.video.VideoSource` or a generated clip.
    target : object
        The reference answer or answers that `Task.score` compares with.
    group : str or None
        Image or video that several questions share; their scores are not independent.
    options : tuple of str or None
        The possible answers, where the task gives them.
    meta : dict
        Further facts; ``kind`` is the category by which tables split scores.
    earlier : tuple of (str, str)
        Questions and answers that came before in the same conversation; the prompt holds all of it.
    """

    id: str
    question: str
    images: tuple[Picture, ...] = ()
    video: Callable[[], Frames] | None = None
    target: Any = None
    group: str | None = None
    options: tuple[str, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def shown(self) -> tuple[Any, ...]:
        """What the model is shown besides the question; equal for questions about the same pictures or video."""
        return self.images, self.video

    def open(self) -> Media:
        """Decode images and video.

        Raises
        ------
        InputError
            One of them is missing or broken; the message names it and the cause.
        """
        video = None
        if self.video is not None:
            try:
                video = self.video()
            except vtc.InputError as error:
                raise vtc.InputError(f"sample {self.id}: {error}") from error
        return Media(self.open_images(), video)

    def open_images(self) -> list[Image.Image]:
        """Decode the images as RGB.

        Raises
        ------
        InputError
            An image is missing or broken; the message names it and the cause.
        """
        return [self._open(number, picture) for number, picture in enumerate(self.images)]

    def _open(self, number: int, picture: Picture) -> Image.Image:
        try:
            opened = picture if isinstance(picture, Path) else picture()
            if isinstance(opened, np.ndarray):
                opened = Image.fromarray(opened)
            return vtc.open_image(opened)
        except (OSError, ValueError) as error:  # vtc.InputError, or a table that is gone or broken
            name = "" if isinstance(picture, Path) else f"image {number}: "
            raise vtc.InputError(f"sample {self.id}: {name}{error}") from error


class Truth(NamedTuple):
    """Where the objects of a generated sample are; the fields are options of `eval.bounds.TruthSelector`.

    Attributes
    ----------
    things : tuple of tuple of int
        The grid cells of every object that questions may name, best first.
    grid : (int, int, int)
        Steps in time, rows and columns of the grid that these cells index.
    seed : tuple of int
        Seed of the random tokens that fill the budget, different for each image.
    """

    things: tuple[tuple[int, ...], ...]
    grid: tuple[int, int, int]
    seed: tuple[int, ...]


class Task(ABC):
    """A set of questions with a scoring rule.

    Attributes
    ----------
    name, modality, licence, source, layout : str
        Identifier; "image" or "video"; licence and origin of the files; the files that `samples` expects.
    max_new_tokens : int
        Maximum length of an answer.
    main_score : str
        The key of `score` that tables show.
    generated : bool
        Drawn on demand: the task has fields ``pictures``, ``per_picture`` and ``seed``.
    knows_truth : bool
        Whether `truth` is available, which is so for generated tasks only.
    """

    name: str
    modality: str = "image"
    licence: str
    source: str
    layout: str
    max_new_tokens: int = 16
    main_score: str = "score"
    generated: bool = False
    knows_truth: bool = False

    @abstractmethod
    def samples(self, folder: Path | None) -> Sequence[Sample]:
        """Return all samples, in the same order every time.

        Raises
        ------
        InputError
            Files or fields are missing; the message states the expected layout.
        """

    @abstractmethod
    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        """Return the scores of one answer by name, `main_score` among them."""

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Aggregate rows with ``sample``, ``group``, ``kind`` and ``scores``; by default the mean of each score."""
        names = dict.fromkeys(name for record in records for name in record["scores"])
        return {name: float(np.mean([record["scores"][name] for record in records])) for name in names}

    def truth(self, sample: Sample) -> Truth:
        """Return where the objects of a sample are, for the oracle and the anti-oracle.

        Raises
        ------
        ConfigError
            The task has no such annotation.
        """
        raise vtc.ConfigError(f"{self.name} does not know which tokens matter, so it has no oracle")


T = TypeVar("T", bound=Task | type[Task])

_TASKS: dict[str, Task | type[Task]] = {}


def register_task(task: T) -> T:
    """Make a task available under its `name`; takes an instance, or as a decorator a class.

    Raises
    ------
    ConfigError
        The name is taken.
    """
    if task.name in _TASKS:
        raise vtc.ConfigError(f"two tasks are called {task.name!r}")
    _TASKS[task.name] = task
    return task


def get_task(name: str, **options: Any) -> Task:
    """Return the task `name` with these options.

    Raises
    ------
    ConfigError
        No task has that name.
    """
    if name not in _TASKS:
        raise vtc.ConfigError(f"no task is called {name!r}; there are: {', '.join(names())}")
    task = _TASKS[name]
    return task(**options) if isinstance(task, type) else dataclasses.replace(task, **options)


def names() -> list[str]:
    """Return the names of all tasks, sorted."""
    return sorted(_TASKS)
