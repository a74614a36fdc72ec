"""Multiple choice: a question, options under capital letters, one of them right."""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import vtc
from eval.scoring.choice import option_letter
from eval.tasks.base import Sample, Task

LETTER = "Answer with the option's letter from the given choices directly."


class Lettered(Task):
    """Reads the letter of an answer; figures are the mean over all questions, and over each kind.

    Class attributes
    ----------------
    kinds_count_alike
        Whether the benchmark's figure is the mean of the kinds' means.
    """

    main_score = "accuracy"
    kinds_count_alike: ClassVar[bool] = False

    def read(self, sample: Sample, prediction: str) -> str | None:
        """The letter that is chosen; None if none is."""
        return option_letter(prediction, sample.options or ())

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(self.read(sample, prediction) == sample.target)}

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        kinds = defaultdict(list)
        for record in records:
            kinds[record.get("kind")].append(record["scores"]["accuracy"])
        means = {str(kind): float(np.mean(hits)) for kind, hits in kinds.items() if kind is not None}
        figures = {"accuracy": float(np.mean([hit for hits in kinds.values() for hit in hits])), **means}
        return figures | ({"mean_of_kinds": float(np.mean(list(means.values())))} if self.kinds_count_alike else {})


@dataclass(frozen=True)
class VideoChoice(Lettered):
    """A question about a video.

    Attributes
    ----------
    frames : int
        How many are shown, evenly spaced.
    """

    modality: ClassVar[str] = "video"

    frames: int = 32


def letters_for(options: Sequence[Any], path: Path, number: int) -> tuple[str, ...]:
    """A letter for each option.

    Raises
    ------
    InputError
        There is but one option, or more than letters.
    """
    if not 2 <= len(options) <= len(string.ascii_uppercase):
        raise vtc.InputError(f"{path}, record {number}: {len(options)} options")
    return tuple(string.ascii_uppercase[: len(options)])


def lettered(options: Sequence[str], form: str = "{letter}. {text}") -> str:
    """Options in lines of their own: "A. cat"."""
    letters = string.ascii_uppercase
    return "\n".join(
        form.format(letter=letter, text=str(text).strip()) for letter, text in zip(letters, options, strict=False)
    )


def letter_at(index: Any, letters: Sequence[str], path: Path, number: int) -> str:
    """The letter of the option number `index`, from 0.

    Raises
    ------
    InputError
        It is not a number of an option.
    """
    try:
        place = int(index)
    except (TypeError, ValueError):
        place = -1
    if not 0 <= place < len(letters):
        raise vtc.InputError(f"{path}, record {number}: answer {index!r} is no number from 0 to {len(letters) - 1}")
    return letters[place]


def letter_of(answer: str, options: Sequence[str], path: Path, number: int) -> str:
    """The letter of the option with this text.

    Raises
    ------
    InputError
        There is none.
    """
    if answer not in options:
        raise vtc.InputError(f"{path}, record {number}: answer {answer!r} is none of {list(options)}")
    return string.ascii_uppercase[list(options).index(answer)]
