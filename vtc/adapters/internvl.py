"""InternVL (as in transformers) and Idefics3 / SmolVLM: equal tiles, pixel shuffle, no tile count in the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.adapters.base import Adapter, Layout, parts_of, rows_of
from vtc.adapters.llava import CropAdapter
from vtc.registry import register_adapter


@register_adapter("internvl")
class InternVLAdapter(CropAdapter):
    """InternVL: an image is one run of tiles in the prompt, a video frame an image."""

    def side(self) -> int:
        vision = self.config.vision_config
        return vision.image_size[0] // vision.patch_size[0]

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        tiles = parts_of(output)
        side = round(len(tiles[0]) ** 0.5)
        return Layout.tiles(len(tiles), (side, side), tiles[0].device)

    def arrange(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        grid = patches.unflatten(1, (self.side(), self.side()))
        shuffled = self.base.pixel_shuffle(grid, scale_factor=self.config.downsample_ratio)
        # Pixel shuffle lays the patches of a cell one after the other along the channels.
        return shuffled.unflatten(-1, (-1, patches.shape[-1])).mean(dim=-2).flatten(0, 2)


@register_adapter("idefics3", "smolvlm")
class Idefics3Adapter(Adapter):
    """Idefics3 and SmolVLM: tiles stand apart in the prompt, each in its own frame of text, so each is a segment."""

    def tower(self, modality: str) -> nn.Module:
        return self.base.vision_model

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.config.scale_factor
        rows = rows_of(output)
        return Layout.tiles(len(rows) // side**2, (side, side), rows.device)

    def arrange(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        shuffled = self.base.connector.pixel_shuffle(patches, self.config.scale_factor)
        return shuffled.unflatten(-1, (-1, patches.shape[-1])).mean(dim=-2).flatten(0, 1)
