"""InternVL (as in transformers) and Idefics3 / SmolVLM: equal tiles, pixel shuffle, no tile count in the call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.adapters.base import Adapter, Layout, parts_of, rows_of, tile_grids
from vtc.adapters.llava import CropAdapter
from vtc.registry import register_adapter


@register_adapter("internvl")
class InternVLAdapter(CropAdapter):
    """InternVL: an image is one run of tiles in the prompt, a video frame an image."""

    video_as_images = True
    view_layout = "tiles"
    lmms_eval = ("internvl_hf", None, "chat.internvl_hf.InternVLHf")

    def side(self) -> int:
        vision = self.config.vision_config
        return vision.image_size[0] // vision.patch_size[0]

    def cell(self, modality: str, call: Mapping[str, Any]) -> int:
        return round(1 / self.config.downsample_ratio)

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        tiles = parts_of(output)
        side = round(len(tiles[0]) ** 0.5)
        return Layout.tiles(len(tiles), (side, side), tiles[0].device)

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        grid = patches.unflatten(1, (self.side(), self.side()))
        shuffled = self.base.pixel_shuffle(grid, scale_factor=self.config.downsample_ratio)
        # Pixel shuffle concatenates the patches that become one token along the channels.
        return shuffled.unflatten(-1, (-1, patches.shape[-1])).mean(dim=-2).flatten(0, 2)


@register_adapter("idefics3", "smolvlm")
class Idefics3Adapter(Adapter):
    """Idefics3 and SmolVLM: the prompt has text between the tiles, so each tile is a segment."""

    view_layout = "separate tiles"

    def tower(self, modality: str) -> nn.Module:
        return self.base.vision_model

    def cell(self, modality: str, call: Mapping[str, Any]) -> int:
        factor: int = self.config.scale_factor
        return factor

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.config.scale_factor
        rows = rows_of(output)
        return Layout.tiles(len(rows) // side**2, (side, side), rows.device)

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        shuffled = self.base.connector.pixel_shuffle(patches, self.config.scale_factor)
        return shuffled.unflatten(-1, (-1, patches.shape[-1])).mean(dim=-2).flatten(0, 1)

    @classmethod
    def tile_grid(cls, count: int, size: tuple[int, int]) -> tuple[int, int]:
        """Fill the longer edge and round the tiles along the shorter one up."""
        width, height = size

        def mismatch(grid: tuple[int, int]) -> tuple[bool, float]:
            rows, columns = grid
            if width >= height:
                rounded = math.ceil(columns * height / width) == rows
            else:
                rounded = math.ceil(rows * width / height) == columns
            return not rounded, abs(columns / rows - width / height)

        return min(tile_grids(count), key=mismatch)
