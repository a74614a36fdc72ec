"""Tokens of the frozen ``qwen2_5_vl`` tower for many scenes and clips, kept in memory-mapped files.

The decoder trains on these without drawing a picture or running the tower again. Rows of one batch have one size, sizes
change from batch to batch: half of the scenes are 224 x 224, the others are cut or extended to other sides.

    python -m eval.reference.train.qwen_data --out runs/qwen --split train --scenes 4800 --clips 3600
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.reference.train.qwen_convert import blank_tower
from eval.reference.train.qwen_crops import ATTRIBUTES
from eval.reference.train.qwen_model import CELL, FRAMES_PER_PATCH, BatchedTower
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
"""Rows of one size that are cached, and trained on, together."""

SIZES: Final = ((224, 224), (224, 224), (224, 224), (168, 224), (224, 224), (224, 168), (280, 224), (224, 280))
"""Height and width of the scene batches, in turn."""

KINDS_ANY_SIZE: Final = tuple(kind for kind in KINDS if kind != "place")
"""Kinds that can be asked of a scene of another size (corners are those of the 224 x 224 scene)."""

PRACTISED: Final = ("place", "relation", "extreme", "digit", "reading", "order", "change", "when", "count")
"""Kinds that take longest to learn; they are asked three times as often in training."""

LABELS: Final = tuple(ATTRIBUTES)[:4]
"""Attributes whose words visual tokens are tied to: colour, shape, text and motion."""

_NO_PIXELS: Final = np.empty((0, 0, 3), np.uint8)
_SHIFT_PURPOSE: Final = 10_000  # keeps the generator of shifts apart from those of pixels and questions


def reframed(scene: Scene, height: int, width: int) -> Scene | None:
    """The scene cut or extended to other sides, by whole cells.

    Returns
    -------
    Scene or None
        A scene whose things have moved along; None where a cut would go through a thing.
    """
    rng = rng_for(scene.split, scene.seed, scene.index, _SHIFT_PURPOSE)
    offsets = []
    for axis, side in ((1, height), (0, width)):
        if side >= CANVAS:
            offsets.append(int(rng.integers(0, (side - CANVAS) // CELL + 1)))
            continue
        low = min((thing.box[axis] for thing in scene.things), default=0)
        high = max((thing.box[axis] + thing.box[axis + 2] for thing in scene.things), default=side)
        first, last = max(0, -(-(high - side) // CELL)), min(low, CANVAS - side) // CELL
        if first > last:
            return None
        offsets.append(-int(rng.integers(first, last + 1)))
    down, right = offsets
    around = sources.background(scene.split, max(height, width), rng)[:height, :width]
    image = np.clip(around, 0, 255).astype(np.uint8)
    top, left = max(0, down) * CELL, max(0, right) * CELL
    part = scene.image[max(0, -down) * CELL :, max(0, -right) * CELL :][: height - top, : width - left]
    image[top : top + part.shape[0], left : left + part.shape[1]] = part
    things = tuple(_moved(thing, down, right, width // CELL) for thing in scene.things)
    return Scene(image, things, scene.split, scene.seed, scene.index)


def _moved(thing: Thing, down: int, right: int, columns: int) -> Thing:
    left, top, width, height = thing.box
    patches = tuple((p // GRID + down) * columns + p % GRID + right for p in thing.patches)
    return replace(thing, box=(left + right * CELL, top + down * CELL, width, height), patches=patches)


def scene_labels(things: Sequence[Thing], cell_count: int) -> NDArray[np.uint8]:
    """Class per cell and attribute of :data:`LABELS`, ``(cell_count, 4)``; 0 is nothing."""
    labels = np.zeros((cell_count, len(LABELS)), np.uint8)
    for thing in things:
        if thing.role == "distractor":
            continue
        for column, word in enumerate((thing.colour, thing.name, thing.text)):
            if word:
                labels[list(thing.patches), column] = ATTRIBUTES[LABELS[column]].index(word) + 1
    return labels


def clip_labels(clip: Clip) -> NDArray[np.uint8]:
    """Class per cell and attribute of a clip, ``(T / 2 * 64, 4)``."""
    labels = np.zeros((clip.length // FRAMES_PER_PATCH * (SIDE // CELL) ** 2, len(LABELS)), np.uint8)
    for actor in clip.objects:
        row = [ATTRIBUTES["colour"].index(actor.colour) + 1, ATTRIBUTES["shape"].index(actor.name) + 1, 0]
        row.append(ATTRIBUTES["motion"].index(actor.direction) + 1 if actor.direction else 0)
        labels[list(cells(actor, clip.length))] = row
    return labels


@dataclass
class Batch:
    """Rows of one size.

    Attributes
    ----------
    modality : str
        ``"image"`` or ``"video"``.
    grid : tuple of int
        ``(t, h, w)`` in tokens.
    first : int
        Where its tokens begin in the cache, in tokens.
    sources : list of Scene or Clip
        Without their pixels.
    kinds : tuple of str
        Kinds of question that can be asked.
    owned : list of list of tuple of int
        For every row, the tokens of each of its things or actors, in their order.
    """

    modality: str
    grid: tuple[int, int, int]
    first: int
    sources: Sequence[Scene | Clip]
    kinds: tuple[str, ...]
    owned: list[list[tuple[int, ...]]]

    @property
    def tokens(self) -> int:
        """Tokens of one row."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def ask(self, count: int, seed: int, *, practice: bool = False) -> list[tuple[Question, ...]]:
        """Questions for every row; another seed asks others. In ``practice`` more of :data:`PRACTISED`."""
        kinds = (*self.kinds, *[kind for kind in self.kinds if kind in PRACTISED] * 2 * practice)
        asked = []
        for source in self.sources:
            if isinstance(source, Clip):
                asked.append(clip_questions.ask(source, count, kinds=kinds, seed=seed))
            else:
                asked.append(scene_questions.ask(source, count, kinds=kinds, seed=seed))
        return asked


def drawn(batch_index: int, modality: str, split: Split, seed: int) -> tuple[Tensor, NDArray[np.uint8], Batch]:
    """Frames ``(B, T, H, W, 3)``, labels ``(B, N, 4)`` and description of one batch; depends on its arguments alone."""
    indices = range(batch_index * BATCH, (batch_index + 1) * BATCH)
    if modality == "video":
        length = LENGTHS[0] if batch_index % 4 < 2 else LENGTHS[batch_index % 4 - 1]  # half are of the shortest length
        clips = [make_clip(split, seed, index, (length,)) for index in indices]
        with tempfile.TemporaryDirectory() as folder:  # as a model will get them: after H.264
            frames = []
            for clip in clips:
                write_mp4(Path(folder) / "clip.mp4", clip.frames)
                frames.append(read_mp4(Path(folder) / "clip.mp4"))
        grid = (length // FRAMES_PER_PATCH, SIDE // CELL, SIDE // CELL)
        bare = [replace(clip, frames=_NO_PIXELS) for clip in clips]
        owned = [[cells(actor, clip.length) for actor in clip.actors] for clip in clips]
        batch = Batch(modality, grid, 0, bare, clip_questions.KINDS, owned)
        return torch.from_numpy(np.stack(frames)), np.stack([clip_labels(clip) for clip in clips]), batch
    height, width = SIZES[batch_index % len(SIZES)]
    kinds: tuple[str, ...] = KINDS
    if (height, width) == (CANVAS, CANVAS):
        scenes = [make_scene(split, seed, index) for index in indices]
    else:
        scenes, kinds = [], KINDS_ANY_SIZE
        for index in indices:
            attempt = 0
            while (scene := reframed(make_scene(split, seed + 1, index + 100_000 * attempt), height, width)) is None:
                attempt += 1
            scenes.append(scene)
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    grid = (1, height // CELL, width // CELL)
    labels = np.stack([scene_labels(scene.things, grid[1] * grid[2]) for scene in scenes])
    bare_scenes = [Scene(_NO_PIXELS, s.things, s.split, s.seed, s.index) for s in scenes]
    owned = [[thing.patches for thing in scene.things] for scene in scenes]
    batch = Batch(modality, grid, 0, bare_scenes, kinds, owned)
    return images[:, None].expand(-1, FRAMES_PER_PATCH, -1, -1, -1), labels, batch


class Cache:
    """Batches of cached tokens in a folder; see the module's text."""

    def __init__(self, folder: Path) -> None:
        self.batches: list[Batch] = pickle.loads((folder / "batches.pkl").read_bytes())
        total = sum(batch.tokens * len(batch.sources) for batch in self.batches)
        self._tokens = np.memmap(folder / "tokens.f16", np.float16, "r").reshape(-1, _WIDTH)[:total]
        self._labels = np.memmap(folder / "labels.u8", np.uint8, "r").reshape(-1, len(LABELS))[:total]

    def tokens(self, batch: Batch) -> Tensor:
        """Cached tokens ``(B, N, WIDTH)`` float32 of a batch."""
        rows = self._tokens[batch.first : batch.first + batch.tokens * len(batch.sources)]
        return torch.from_numpy(rows.astype(np.float32)).view(len(batch.sources), batch.tokens, -1)

    def labels(self, batch: Batch) -> Tensor:
        """Classes ``(B, N, 4)`` int64 of a batch."""
        rows = self._labels[batch.first : batch.first + batch.tokens * len(batch.sources)]
        return torch.from_numpy(rows.astype(np.int64)).view(len(batch.sources), batch.tokens, -1)


_WIDTH: Final = 256


@torch.no_grad()
def build(tower: BatchedTower, folder: Path, split: Split, scenes: int, clips: int, seed: int = 0) -> None:
    """Fill ``folder``; scene and clip batches alternate as long as there are both."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = sorted(
        [((i + 0.5) / max(1, scenes // BATCH), "image", i) for i in range(scenes // BATCH)]
        + [((i + 0.5) / max(1, clips // BATCH), "video", i) for i in range(clips // BATCH)]
    )
    batches: list[Batch] = []
    first, began = 0, time.time()
    with (folder / "tokens.f16").open("wb") as tokens_file, (folder / "labels.u8").open("wb") as labels_file:
        for number, (_, modality, index) in enumerate(plan, 1):
            frames, labels, batch = drawn(index, modality, split, seed)
            with torch.autocast("cpu", torch.bfloat16):
                tokens = tower(frames)
            tokens_file.write(tokens.to(torch.float16).numpy().tobytes())
            labels_file.write(labels.tobytes())
            batch.first = first
            first += batch.tokens * len(batch.sources)
            batches.append(batch)
            if number % 50 == 0 or number == len(plan):
                tokens_file.flush()
                labels_file.flush()
                (folder / "batches.tmp").write_bytes(pickle.dumps(batches))
                (folder / "batches.tmp").replace(folder / "batches.pkl")
                print(f"{number}/{len(plan)} batches, {time.time() - began:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder with tower.pt; the cache goes to OUT/SPLIT")
    parser.add_argument("--split", choices=sources.SPLITS, required=True)
    parser.add_argument("--scenes", type=int, default=4800)
    parser.add_argument("--clips", type=int, default=3600)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    visual = blank_tower()
    visual.load_state_dict(torch.load(arguments.out / "tower.pt", weights_only=True)["visual"])
    build(BatchedTower(visual), arguments.out / arguments.split, arguments.split, arguments.scenes, arguments.clips)


if __name__ == "__main__":
    main()
