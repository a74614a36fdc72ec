"""Features of the frozen DINOv2 tower, on which ``llava`` and ``internvl`` train without running it again."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, Dinov2Model

from eval.tasks.scenes.scene import Scene, Thing, make_scene
from eval.tasks.scenes.sources import Split

PACKAGE = Path(__file__).parents[1] / "src" / "vtc_reference"
TOKENIZER = PACKAGE / "tokenizer"

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
VIEWS = 5  # four tiles and the thumbnail
PATCH = 14  # pixels
FRAMES_PER_PATCH = 2  # of the qwen2_5_vl tower
NO_PIXELS = np.empty((0, 0, 3), np.uint8)  # questions need the things of a scene, not its pixels


def without_pixels(things: tuple[Thing, ...], split: Split, seed: int, index: int) -> Scene:
    """Return a scene that questions can be asked about, without its image."""
    return Scene(NO_PIXELS, things, split, seed, index)


@dataclass
class Data:
    """Cached features with what the scenes hold; ``places`` are (shard, row) of every scene."""

    shards: list[NDArray[np.float16]]
    scenes: list[Any]
    places: list[tuple[int, int]]

    @classmethod
    def load(cls, split: Split, cache: Path, known: Callable[..., Any] = without_pixels) -> Data:
        """Read every shard ``<split>*`` of the cache; `known` makes a scene of what it holds, split, seed and index."""
        data = cls([], [], [])
        for folder in sorted(cache.glob(f"{split}*")):
            state = json.loads((folder / "state.json").read_text())
            things = pickle.loads((folder / "things.pkl").read_bytes())
            data.places += [(len(data.shards), index) for index in range(len(things))]
            data.shards.append(np.load(folder / "features.npy", mmap_mode="r"))
            data.scenes += [known(t, split, state["seed"], index) for index, t in enumerate(things)]
        if not data.scenes:
            raise ValueError(f"no cached {split} scenes in {cache}; make them with eval.reference.train.cache")
        return data

    def batch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Features ``(n, views, 256, 384)`` of the scenes, in the order given."""
        places = [self.places[int(index)] for index in indices]
        return torch.from_numpy(np.stack([self.shards[shard][row] for shard, row in places]))


def normalised(images: NDArray[np.uint8]) -> torch.Tensor:
    """``(n, 224, 224, 3)`` uint8 to normalised ``(n, 3, 224, 224)`` float32."""
    pixels = torch.from_numpy(images).float().div_(255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (pixels - mean) / std


@torch.no_grad()
def tower_features(tower: Dinov2Model, pixels: torch.Tensor, views: int = 1) -> torch.Tensor:
    """Patch tokens ``(views, n, 256, 384)`` float16 of ``pixels (n * views, 3, 224, 224)``."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden: torch.Tensor = tower.embeddings(pixels)
        for layer in tower.encoder.layer[:-1]:
            hidden = layer(hidden)
    return hidden[:, 1:].half().unflatten(0, (-1, views)).transpose(0, 1)


def build(split: Split, count: int, tower: Path, folder: Path, seed: int = 0, tiles: bool = False) -> None:
    """Cache the tower's features of scenes.

    ``features.npy (scenes, views, 256, 384)`` holds patch tokens of the second-last layer, as the stock LLaVA class
    reads them. One view is the whole scene; with ``tiles`` the four that InternVL's processor cuts come before it.
    """
    model = Dinov2Model.from_pretrained(tower).eval()
    cut = AutoImageProcessor.from_pretrained(PACKAGE / "internvl")
    folder.mkdir(parents=True, exist_ok=True)
    views, batch = VIEWS if tiles else 1, 16
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (count, views, 256, 384))
    things = []
    for first in range(0, count, batch):
        scenes = [make_scene(split, seed, index) for index in range(first, min(first + batch, count))]
        if tiles:
            pixels = cut([Image.fromarray(scene.image) for scene in scenes], return_tensors="pt").pixel_values
        else:
            pixels = normalised(np.stack([scene.image for scene in scenes]))
        features[first : first + len(scenes)] = tower_features(model, pixels, views).transpose(0, 1).numpy()
        things += [scene.things for scene in scenes]
    features.flush()
    (folder / "things.pkl").write_bytes(pickle.dumps(things))
    (folder / "state.json").write_text(json.dumps({"split": split, "seed": seed, "count": count}))
