"""What a task is: samples from files on disk, a prompt for each, and the official way to score an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

import vtc
from eval.tasks.video import Footage

Picture = Path | Callable[[], Any]
"""A file, or something that makes the picture when called: bytes in a table, a generated scene."""


SUBTITLES = "{subtitles}"
"""Where a question wants what is said during the frames that are shown."""


class Media(NamedTuple):
    """What a sample shows, decoded."""

    images: list[Image.Image]
    video: Footage | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """One question.

    Attributes
    ----------
    id : str
        Unique within the task, the same in every run.
    question : str
        What the model is told, the task's official suffix included.
    images : tuple of Path or callable
        Opened when they are needed.
    video : callable or None
        Makes the frames that are shown when they are needed: an `eval.tasks.video.Clip`, a generated clip.
    target : object
        What `Task.score` compares with.
    group : str or None
        Image or video that several questions share: they are not independent.
    options : tuple of str or None
        The possible answers, where the task gives them.
    meta : dict
        What else the scorer or a reader wants; ``kind`` sorts tables.
    """

    id: str
    question: str
    images: tuple[Picture, ...] = ()
    video: Callable[[], Footage] | None = None
    target: Any = None
    group: str | None = None
    options: tuple[str, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def asked(self, shown: Media) -> str:
        """The question as it is put to a model, subtitles of the frames that are shown filled in."""
        spoken = shown.video.subtitles if shown.video is not None else ()
        return self.question.replace(SUBTITLES, "\n".join(spoken) or "No subtitles available")

    def open(self) -> Media:
        """Pictures and video, decoded.

        Raises
        ------
        InputError
            One of them is missing or broken; names it and the cause.
        """
        video = None
        if self.video is not None:
            try:
                video = self.video()
            except vtc.InputError as error:
                raise vtc.InputError(f"sample {self.id}: {error}") from error
        return Media(self.open_images(), video)

    def open_images(self) -> list[Image.Image]:
        """The pictures in RGB, decoded.

        Raises
        ------
        InputError
            A picture is missing or broken; names it and the cause.
        """
        return [self._open(number, picture) for number, picture in enumerate(self.images)]

    def _open(self, number: int, picture: Picture) -> Image.Image:
        name = str(picture) if isinstance(picture, Path) else f"image {number}"
        try:
            opened = Image.open(picture) if isinstance(picture, Path) else picture()
            if isinstance(opened, np.ndarray):
                opened = Image.fromarray(opened)
            return opened.convert("RGB")
        except FileNotFoundError as error:
            raise vtc.InputError(f"sample {self.id}: {error.filename or name}: no such file") from error
        except UnidentifiedImageError as error:
            raise vtc.InputError(f"sample {self.id}: {name}: not a picture that pillow can read") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise vtc.InputError(f"sample {self.id}: {name}: {error}") from error


class Truth(NamedTuple):
    """What is where: see `eval.bounds.TruthSelector`, whose options these are.

    Attributes
    ----------
    things : tuple of tuple of int
        The cells of everything that questions may name, best first.
    grid : (int, int, int)
        Steps in time, rows and columns that these cells are numbered in.
    seed : tuple of int
        Another for each picture, so that what is drawn beside them differs.
    """

    things: tuple[tuple[int, ...], ...]
    grid: tuple[int, int, int]
    seed: tuple[int, ...]


class Task(ABC):
    """A benchmark.

    Class attributes
    ----------------
    name, modality, licence, source, layout
        Id; "image" or "video"; under which licence and from where its files come; which files `samples` expects.
    max_new_tokens
        Room for an answer.
    main_score
        The key of `score` that tables show.
    knows_truth
        Whether `truth` works: only generated tasks know which tokens matter.
    """

    name: ClassVar[str]
    modality: ClassVar[str] = "image"
    licence: ClassVar[str]
    source: ClassVar[str]
    layout: ClassVar[str]
    max_new_tokens: ClassVar[int] = 16
    main_score: ClassVar[str] = "score"
    knows_truth: ClassVar[bool] = False

    @abstractmethod
    def samples(self, folder: Path | None) -> Sequence[Sample]:
        """All samples, in the same order every time.

        Raises
        ------
        InputError
            Files or columns are missing; the message states the expected layout.
        """

    @abstractmethod
    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        """Scores of one answer, by name; `main_score` among them."""

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Official figures over rows with ``sample``, ``group``, ``prediction`` and ``scores``; means by default."""
        names = dict.fromkeys(name for record in records for name in record["scores"])
        return {name: float(np.mean([record["scores"][name] for record in records])) for name in names}

    def truth(self, sample: Sample) -> Truth:
        """What the sample shows where, for an oracle and its opposite.

        Raises
        ------
        ConfigError
            The task does not know.
        """
        raise vtc.ConfigError(f"{self.name} does not know which tokens matter, so it has no oracle")


_TASKS: dict[str, type[Task]] = {}


def register_task(cls: type[Task]) -> type[Task]:
    """Class decorator: make a task available under its `name`."""
    if cls.name in _TASKS:
        raise vtc.ConfigError(f"two tasks are called {cls.name!r}")
    _TASKS[cls.name] = cls
    return cls


def get_task(name: str, **options: Any) -> Task:
    """The task `name`.

    Raises
    ------
    ConfigError
        There is none of that name.
    """
    if name not in _TASKS:
        raise vtc.ConfigError(f"no task is called {name!r}; there are: {', '.join(names())}")
    return _TASKS[name](**options)


def names() -> list[str]:
    """Names of all tasks, sorted."""
    return sorted(_TASKS)
