"""Cache what the frozen tower says about many scenes, so that decoders train without running it again.

    python -m eval.reference.train.cache --split train --count 12000 --tower tower/ --folder cache/train-0

writes ``features.npy`` ``(scenes, views, 256, 384)`` float16 (the second-last layer's patch tokens, [CLS] dropped, as
the stock LLaVA class reads them), ``things.pkl`` (what stands in each scene) and, for the test split,
``cls_attention.npy`` ``(scenes, layers, heads, 256)``. One view is the whole scene; with ``--tiles`` the four that
InternVL's image processor cuts from the scene enlarged twice come before it (which is the thumbnail). Interrupted
runs continue where they stopped.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import Dinov2Model
from transformers.models.got_ocr2 import GotOcr2ImageProcessor

from eval.tasks.scenes.scene import make_scene

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
VIEWS = 5  # four tiles and the thumbnail
FEATURE_LAYER = -2  # index into hidden_states: the output of the second-last layer
ATTENTION_LAYERS = (9, 10, 11)  # 0-based layers whose [CLS] rows are kept for the test split


def normalised(images: NDArray[np.uint8]) -> torch.Tensor:
    """``(n, 224, 224, 3)`` uint8 to normalised ``(n, 3, 224, 224)`` float32."""
    pixels = torch.from_numpy(images).float().div_(255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (pixels - mean) / std


@torch.no_grad()
def tower_features(tower: Dinov2Model, pixels: torch.Tensor, attention: bool = False) -> tuple[torch.Tensor, ...]:
    """Patch tokens of the feature layer ``(n, 256, 384)``, and the [CLS] rows ``(n, layers, heads, 256)`` if asked."""
    with torch.autocast("cpu", torch.bfloat16):
        if not attention:
            return (second_last(tower, pixels)[:, 1:].half(),)
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
    features = out.hidden_states[FEATURE_LAYER][:, 1:].half()
    rows = torch.stack([out.attentions[layer][:, :, 0, 1:] for layer in ATTENTION_LAYERS], 1)
    return features, rows.half()


def second_last(tower: Dinov2Model, pixels: torch.Tensor) -> torch.Tensor:
    """The output of the second-last layer ``(n, 257, 384)``, without running the last."""
    hidden: torch.Tensor = tower.embeddings(pixels)
    for layer in tower.encoder.layer[: FEATURE_LAYER + 1]:
        hidden = layer(hidden)
    return hidden


def tile_processor() -> GotOcr2ImageProcessor:
    """InternVL's image processor, set to cut square pictures into 2 x 2 tiles of 224 pixels and a thumbnail."""
    return GotOcr2ImageProcessor(
        size={"height": 224, "width": 224},
        crop_to_patches=True,
        min_patches=VIEWS - 1,
        max_patches=VIEWS - 1,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )


def tiled(images: NDArray[np.uint8]) -> torch.Tensor:
    """``(n, 224, 224, 3)`` uint8 to tiles and thumbnails ``(n * 5, 3, 224, 224)``."""
    pictures = [Image.fromarray(image) for image in images]
    pixels: torch.Tensor = tile_processor()(pictures, return_tensors="pt").pixel_values
    return pixels


def build(
    split: str, seed: int, count: int, tower: Dinov2Model, folder: Path, tiles: bool = False, batch: int = 16
) -> None:
    """Fill ``folder`` (see the module's text); continues an interrupted run."""
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "state.json"
    done = json.loads(state_file.read_text())["done"] if state_file.exists() else 0
    mode = "r+" if done else "w+"
    views = VIEWS if tiles else 1
    features = np.lib.format.open_memmap(folder / "features.npy", mode, np.float16, (count, views, 256, 384))
    with_attention = split == "test" and not tiles
    if with_attention:
        rows = np.lib.format.open_memmap(folder / "cls_attention.npy", mode, np.float16, (count, 3, 6, 256))
        tower.set_attn_implementation("eager")
    things = pickle.loads((folder / "things.pkl").read_bytes()) if done else []
    start = time.time()
    for first in range(done, count, batch):
        scenes = [make_scene(split, seed, index) for index in range(first, min(first + batch, count))]  # type: ignore[arg-type]
        images = np.stack([scene.image for scene in scenes])
        out = tower_features(tower, tiled(images) if tiles else normalised(images), with_attention)
        last = first + len(scenes)
        features[first:last] = out[0].unflatten(0, (len(scenes), views)).numpy()
        if with_attention:
            rows[first:last] = out[1].numpy()
        things += [scene.things for scene in scenes]
        if (first // batch) % 40 == 39 or last == count:
            features.flush()
            (folder / "things.pkl").write_bytes(pickle.dumps(things))
            state_file.write_text(json.dumps({"done": last, "split": split, "seed": seed, "count": count}))
            cpu = time.process_time()
            print(f"{last}/{count} scenes, {time.time() - start:.0f} s wall, {cpu:.0f} s CPU", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("train", "test"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tiles", action="store_true", help="four tiles of each scene as well")
    arguments = parser.parse_args()
    tower = Dinov2Model.from_pretrained(arguments.tower).eval()
    build(arguments.split, arguments.seed, arguments.count, tower, arguments.folder, arguments.tiles)


if __name__ == "__main__":
    main()
