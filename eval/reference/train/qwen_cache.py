"""Tokens of the trained, frozen ``qwen2_5_vl`` tower for many scenes and clips.

Rows of one batch have one size, sizes change from batch to batch: five of eight batches of scenes are 224 x 224, the
others are cut or extended to other sides. Clips go through H.264.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from eval.reference.train.cache import FRAMES_PER_PATCH, NO_PIXELS, PATCH, without_pixels
from eval.reference.train.labels import clip_labels, event_labels, scene_labels
from eval.reference.train.models import new_model
from eval.reference.train.qwen_tower import tower_tokens
from eval.tasks.clips import questions as clip_questions
from eval.tasks.clips.clip import LENGTHS, SIDE, Clip, cells, make_clip
from eval.tasks.clips.files import read_mp4, write_mp4
from eval.tasks.scenes import questions as scene_questions
from eval.tasks.scenes import sources
from eval.tasks.scenes.questions import Question
from eval.tasks.scenes.scene import Scene, Thing, make_scene, rng_for
from eval.tasks.scenes.sources import Split
from eval.tasks.scenes.vocabulary import CANVAS, GRID, KINDS

BATCH: Final = 12
SIZES: Final = ((224, 224), (224, 224), (224, 224), (168, 224), (224, 224), (224, 168), (280, 224), (224, 280))
"""Height and width of the batches of scenes, in turn."""

OTHER_SIZES: Final = tuple(size for size in SIZES if size != (CANVAS, CANVAS))

KINDS_ANY_SIZE: Final = tuple(kind for kind in KINDS if kind != "place")
"""Kinds that can be asked of a scene of another size (corners are those of the 224 x 224 scene)."""

PRACTICED: Final = ("place", "relation", "extreme", "digit", "reading", "order", "change", "when", "count")
"""Kinds that take longest to learn; in training they are asked three times as often."""

_SHIFT_PURPOSE: Final = 10_000  # keeps the generator of shifts apart from those of pixels and questions


def reframed(scene: Scene, height: int, width: int) -> Scene | None:
    """Cut or extend a scene to other sides, by whole patches; None where a cut would go through a thing."""
    rng = rng_for(scene.split, scene.seed, scene.index, _SHIFT_PURPOSE)
    offsets = []
    for axis, side in ((1, height), (0, width)):
        if side >= CANVAS:
            offsets.append(int(rng.integers(0, (side - CANVAS) // PATCH + 1)))
            continue
        low = min((thing.box[axis] for thing in scene.things), default=0)
        high = max((thing.box[axis] + thing.box[axis + 2] for thing in scene.things), default=side)
        first, last = max(0, -(-(high - side) // PATCH)), min(low, CANVAS - side) // PATCH
        if first > last:
            return None
        offsets.append(-int(rng.integers(first, last + 1)))
    down, right = offsets
    around = sources.background(scene.split, max(height, width), rng)[:height, :width]
    image = np.clip(around, 0, 255).astype(np.uint8)
    top, left = max(0, down) * PATCH, max(0, right) * PATCH
    part = scene.image[max(0, -down) * PATCH :, max(0, -right) * PATCH :][: height - top, : width - left]
    image[top : top + part.shape[0], left : left + part.shape[1]] = part
    things = tuple(_moved(thing, down, right, width // PATCH) for thing in scene.things)
    return Scene(image, things, scene.split, scene.seed, scene.index)


def _moved(thing: Thing, down: int, right: int, columns: int) -> Thing:
    left, top, width, height = thing.box
    patches = tuple((p // GRID + down) * columns + p % GRID + right for p in thing.patches)
    return replace(thing, box=(left + right * PATCH, top + down * PATCH, width, height), patches=patches)


@dataclass
class Batch:
    """Rows of one size; ``grid`` is ``(t, h, w)`` in tokens, ``sources`` are without their pixels.

    ``owned`` holds, for every row, the tokens of each of its things or actors, in their order.
    """

    grid: tuple[int, int, int]
    sources: Sequence[Scene | Clip]
    kinds: tuple[str, ...]
    owned: list[list[tuple[int, ...]]]
    labels: Tensor  # (B, N, 4) uint8
    tokens: Tensor  # (B, N, 256) float16
    events: Tensor | None = None  # (B, N), of clips

    def ask(self, count: int, seed: int, *, practice: bool = False) -> list[tuple[Question, ...]]:
        """Ask questions about every row; another seed asks others. In ``practice`` more of :data:`PRACTICED`."""
        kinds = (*self.kinds, *[kind for kind in self.kinds if kind in PRACTICED] * 2 * practice)
        return [
            (clip_questions if isinstance(source, Clip) else scene_questions).ask(source, count, kinds=kinds, seed=seed)
            for source in self.sources
        ]


def draw_clips(index: int, split: Split, seed: int) -> tuple[Tensor, Batch]:
    """Frames ``(B, T, H, W, 3)`` and description of one batch of clips, without tokens."""
    length = LENGTHS[0] if index % 4 < 2 else LENGTHS[index % 4 - 1]  # half are of the shortest length
    clips = [make_clip(split, seed, i, (length,)) for i in range(index * BATCH, (index + 1) * BATCH)]
    frames = []
    with tempfile.TemporaryDirectory() as folder:  # as a model will get them: after H.264
        for clip in clips:
            write_mp4(Path(folder) / "clip.mp4", clip.frames)
            frames.append(read_mp4(Path(folder) / "clip.mp4"))
    batch = Batch(
        grid=(length // FRAMES_PER_PATCH, SIDE // PATCH, SIDE // PATCH),
        sources=[replace(clip, frames=NO_PIXELS) for clip in clips],
        kinds=clip_questions.KINDS,
        owned=[[cells(actor, clip.length) for actor in clip.actors] for clip in clips],
        labels=torch.from_numpy(np.stack([clip_labels(clip) for clip in clips])),
        tokens=torch.empty(0),
        events=torch.stack([event_labels(clip) for clip in clips]),
    )
    return torch.from_numpy(np.stack(frames)), batch


def draw_scenes(index: int, split: Split, seed: int) -> tuple[Tensor, Batch]:
    """Frames ``(B, 2, H, W, 3)`` and description of one batch of scenes, without tokens."""
    return draw_sized(index, split, seed, *SIZES[index % len(SIZES)])


def draw_sized(index: int, split: Split, seed: int, height: int, width: int) -> tuple[Tensor, Batch]:
    """Draw a batch of scenes of one size."""
    same = (height, width) == (CANVAS, CANVAS)
    scenes: list[Scene] = []
    for i in range(index * BATCH, (index + 1) * BATCH):
        scene = make_scene(split, seed, i) if same else None
        attempt = 0
        while scene is None:
            scene = reframed(make_scene(split, seed + 1, i + 100_000 * attempt), height, width)
            attempt += 1
        scenes.append(scene)
    patches = height // PATCH * (width // PATCH)
    batch = Batch(
        grid=(1, height // PATCH, width // PATCH),
        sources=[without_pixels(s.things, s.split, s.seed, s.index) for s in scenes],
        kinds=KINDS if same else KINDS_ANY_SIZE,
        owned=[[thing.patches for thing in scene.things] for scene in scenes],
        labels=torch.from_numpy(np.stack([scene_labels(scene.things, patches) for scene in scenes])),
        tokens=torch.empty(0),
    )
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    return images[:, None].expand(-1, FRAMES_PER_PATCH, -1, -1, -1), batch


Draw = Callable[[int, Split, int], tuple[Tensor, Batch]]
"""Draws the batch of a number out of a split by a seed."""


def build(run: Path, split: Split, scenes: int, clips: int, seed: int = 0) -> None:
    """Cache the tokens of scenes and clips by ``RUN/tower.pt`` in ``RUN/SPLIT.pt``; their batches take turns."""
    write(run, split, seed, ((draw_scenes, scenes), (draw_clips, clips)))


@torch.no_grad()
def write(run: Path, split: Split, seed: int, drawn: Sequence[tuple[Draw, int]]) -> None:
    """Cache so many pictures or clips of each way to draw them; their batches take turns."""
    visual = new_model("qwen2_5_vl").model.visual
    visual.load_state_dict(torch.load(run / "tower.pt", weights_only=True))
    plan = [((i + 0.5) / (count // BATCH), draw, i) for draw, count in drawn for i in range(count // BATCH)]
    batches = []
    for _, draw, index in sorted(plan, key=lambda entry: entry[0]):
        frames, batch = draw(index, split, seed)
        with torch.autocast("cpu", torch.bfloat16):
            batch.tokens = tower_tokens(visual, frames).half()
        batches.append(vars(batch))
    torch.save(batches, run / f"{split}.pt")


def load(file: Path) -> list[Batch]:
    """Return the batches that :func:`build` wrote; tensors are mapped, not read."""
    return [Batch(**fields) for fields in torch.load(file, mmap=True, weights_only=False)]
