"""The offline tasks: held-out scenes and clips of the reference models' domain, drawn on demand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eval.tasks.base import Picture, Sample, Task, Truth, register_task
from eval.tasks.video import Frames

if TYPE_CHECKING:
    from eval.tasks.scenes.questions import Question


class Generated(Task):
    """Scores 1 for the exact answer; the task knows which tokens show what a question is about."""

    licence = "Apache-2.0; photographs and digits see eval/reference/README.md"
    layout = "no files"
    max_new_tokens = 6
    main_score = "exact"
    generated = True
    knows_truth = True

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"exact": float(prediction.strip() == sample.target)}


@register_task
@dataclass(frozen=True)
class ScenesTask(Generated):
    """Asks about objects, digits and signs on photographs.

    Attributes
    ----------
    kinds : tuple of str or None
        Kinds of question; None: all that have one-word answers.
    pictures : int
        Number of them.
    per_picture : int
        Maximum number of questions about each.
    seed : int
        Each seed draws other pictures of the held-out split.
    """

    name = "scenes"
    source = "drawn by eval/tasks/scenes"

    kinds: ClassVar[tuple[str, ...] | None] = None

    pictures: int = 100
    per_picture: int = 10
    seed: int = 0

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        from eval.tasks.scenes.questions import ask
        from eval.tasks.scenes.vocabulary import KINDS

        found: list[Sample] = []
        for index in range(self.pictures):
            asked = ask(scene_at(self.seed, index), self.per_picture, kinds=self.kinds or KINDS)
            found += about(f"scene-{index}", asked, images=(functools.partial(drawn, self.seed, index),), index=index)
        return found

    def truth(self, sample: Sample) -> Truth:
        """List the patches of each object, the one that it fills most first."""
        from eval.tasks.scenes.vocabulary import GRID

        index = int(sample.meta["index"])
        things = tuple(thing.patches for thing in scene_at(self.seed, index).things if thing.role != "distractor")
        return Truth(things, (1, GRID, GRID), (self.seed, index))


@register_task
@dataclass(frozen=True)
class ClipsTask(Generated):
    """Asks about shapes that move, appear and disappear; all 8 to 16 frames of a clip are shown.

    Attributes
    ----------
    kinds : tuple of str or None
        Kinds of question; None: all that have one-word answers.
    pictures : int
        Number of clips.
    per_picture : int
        Maximum number of questions about each.
    seed : int
        Each seed draws other clips of the held-out split.
    """

    name = "clips"
    modality = "video"
    source = "drawn by eval/tasks/clips"

    kinds: ClassVar[tuple[str, ...] | None] = None

    pictures: int = 100
    per_picture: int = 7
    seed: int = 0

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        from eval.tasks.clips.questions import KINDS, ask

        found: list[Sample] = []
        for index in range(self.pictures):
            asked = ask(_clip(self.seed, index), self.per_picture, kinds=self.kinds or KINDS)
            found += about(f"clip-{index}", asked, video=functools.partial(_frames, self.seed, index), index=index)
        return found

    def truth(self, sample: Sample) -> Truth:
        """List the cells of each object, its first and last time step first: they show where it went and when."""
        from eval.tasks.clips.clip import SIDE, cells

        index = int(sample.meta["index"])
        clip, side = _clip(self.seed, index), SIDE // 14
        things = tuple(_ends_first(cells(actor, clip.length), side * side) for actor in clip.objects)
        return Truth(things, (clip.length // 2, side, side), (self.seed, index))


def about(
    group: str,
    asked: Sequence[Question],
    *,
    images: tuple[Picture, ...] = (),
    video: Callable[[], Frames] | None = None,
    **meta: Any,
) -> list[Sample]:
    """Return a sample for each question about one picture or clip."""
    return [
        Sample(
            id=f"{group}-{number}",
            question=question.text,
            images=images,
            video=video,
            target=question.answer,
            group=group,
            options=question.options,
            meta={"kind": question.kind, **meta},
        )
        for number, question in enumerate(asked)
    ]


def _ends_first(tokens: Sequence[int], per_step: int) -> tuple[int, ...]:
    """Order tokens: one of the first step, of the last, the second, the second-last ...; then a second of each."""
    steps: dict[int, list[int]] = {}
    for token in tokens:
        steps.setdefault(token // per_step, []).append(token)
    inwards = sorted(steps)
    order = [inwards.pop(0 if turn % 2 == 0 else -1) for turn in range(len(steps))]
    deepest = max((len(each) for each in steps.values()), default=0)
    return tuple(steps[step][depth] for depth in range(deepest) for step in order if depth < len(steps[step]))


@functools.lru_cache(maxsize=64)
def scene_at(seed: int, index: int) -> Any:
    """Draw a scene of the held-out split, or return it if it was among the last."""
    from eval.tasks.scenes.scene import make_scene

    return make_scene("test", seed, index)


def drawn(seed: int, index: int) -> Any:
    """Return the picture of a scene of the held-out split."""
    return scene_at(seed, index).image


@functools.lru_cache(maxsize=64)
def _clip(seed: int, index: int) -> Any:
    from eval.tasks.clips.clip import make_clip

    return make_clip("test", seed, index)


def _frames(seed: int, index: int) -> Frames:
    from eval.tasks.clips.clip import FPS

    clip = _clip(seed, index)
    return Frames(clip.frames, tuple(range(clip.length)), float(FPS), clip.length)
