"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: tiled images with newline tokens, pooled video frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from vtc.adapters.base import Layout, parts_of, rows_of
from vtc.adapters.llava import CropAdapter
from vtc.core.grids import Grid
from vtc.errors import UnsupportedModelError
from vtc.registry import register_adapter


class AnyResAdapter(CropAdapter):
    """Images cut into a thumbnail and tiles, unpadded, with a newline after every row of the large grid.

    Values of patches pass through the model's own packing code, so that whatever it does to features (join tiles,
    unpad, interpolate) is done to them.
    """

    view_layout = "anyres"

    def pack(
        self, call: Mapping[str, Any], crops: Sequence[torch.Tensor], newline: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Pack values (tiles, M, C) per image as the model packs features, with `newline` (C,) or without."""
        packed, _ = self.base.pack_image_features(
            list(crops), call["image_sizes"], vision_feature_select_strategy="default", image_newline=newline
        )
        return packed

    def tile_counts(self, call: Mapping[str, Any]) -> list[int]:
        """Count the crops per image, thumbnail included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return [
            image_size_to_num_patches(
                image_size=size,
                grid_pinpoints=self.config.image_grid_pinpoints,
                patch_size=self.config.vision_config.image_size,
            )
            for size in call["image_sizes"]
        ]

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        if modality == "video":
            return self.video_layout(call, output)
        counts = self.tile_counts(call)
        features = parts_of(output)
        blank = features[0].new_zeros(sum(counts), self.side() ** 2, 1, dtype=torch.float32)
        # With patches of zeros and a newline of ones, the ones in the result are the newlines.
        marks = self.pack(call, blank.split(counts), blank.new_ones(1))
        structural = [mark[:, 0] > 0.5 for mark in marks]
        grids = [self._views(count, mark) for count, mark in zip(counts, structural, strict=True)]
        return Layout([len(part) for part in features], grids, torch.cat(structural))

    def _views(self, tiles: int, newline: torch.Tensor) -> tuple[Grid, ...]:
        base: Grid = (1, self.side(), self.side())
        if tiles == 1:
            return (base,)
        rows = int(newline.sum())
        return base, (1, rows, (len(newline) - self.side() ** 2) // rows - 1)

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        if modality == "video":
            return self.video_patches_to_tokens(call, patches)
        crops = patches.split(self.tile_counts(call))
        return torch.cat(self.pack(call, crops, patches.new_zeros(patches.shape[-1])))

    def video_layout(self, call: Mapping[str, Any], output: Any) -> Layout:
        """Do as `layout`, for videos."""
        raise UnsupportedModelError(f"{self.config.model_type} has no videos")

    def video_patches_to_tokens(self, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        """Do as `patches_to_tokens`, for the frames of videos."""
        raise UnsupportedModelError(f"{self.config.model_type} has no videos")


@register_adapter("llava_next")
class LlavaNextAdapter(AnyResAdapter):
    """LLaVA-NeXT: images only."""


@register_adapter("llava_next_video")
class LlavaNextVideoAdapter(AnyResAdapter):
    """LLaVA-NeXT-Video: frames pooled on the patch grid before the projector, no newlines."""

    modalities = ("image", "video")

    @classmethod
    def fit(cls, modality: str) -> Literal["crop", "pad", "stretch"]:
        return "crop" if modality == "video" else "stretch"

    def cell(self, modality: str, call: Mapping[str, Any]) -> int:
        return int(self.config.spatial_pool_stride) if modality == "video" else 1

    def video_layout(self, call: Mapping[str, Any], output: Any) -> Layout:
        lengths = [len(video) for video in parts_of(output)]
        frames = call["pixel_values_videos"].shape[1]
        side = self.side() // self.config.spatial_pool_stride
        structural = torch.zeros(sum(lengths), dtype=torch.bool, device=rows_of(output).device)
        return Layout(lengths, [((frames, side, side),)] * len(lengths), structural)

    def video_patches_to_tokens(self, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        grid = patches.transpose(1, 2).unflatten(-1, (self.side(), self.side()))
        pooled = nn.functional.avg_pool2d(grid, self.config.spatial_pool_stride)
        return pooled.flatten(2).transpose(1, 2).flatten(0, 1)


@register_adapter("llava_onevision")
class LlavaOnevisionAdapter(AnyResAdapter):
    """LLaVA-OneVision: large grids interpolated down to a limit; video frames halved, one newline at the end."""

    modalities = ("image", "video")
    # lmms-eval's own llava_onevision needs the LLaVA package; its llava_hf reads checkpoints of transformers.
    lmms_eval = ("llava_onevision", "simple.llava_hf.LlavaHf", "chat.llava_hf.LlavaHf")

    @classmethod
    def fit(cls, modality: str) -> Literal["crop", "pad", "stretch"]:
        # Of several images in one prompt, which are not cut into tiles.
        return "pad" if modality == "image" else "stretch"

    def pack(
        self, call: Mapping[str, Any], crops: Sequence[torch.Tensor], newline: torch.Tensor | None
    ) -> list[torch.Tensor]:
        ratio = call.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        packed, _ = self.base.pack_image_features(
            list(crops), call["image_sizes"], image_newline=newline, vision_aspect_ratio=ratio
        )
        return packed

    def tile_counts(self, call: Mapping[str, Any]) -> list[int]:
        counts = super().tile_counts(call)
        images = call.get("batch_num_images")
        if images is None:
            return counts
        alone = [bool(n == 1) for n in images for _ in range(int(n))]  # only a single image is cut into tiles
        return [count if single else 1 for count, single in zip(counts, alone, strict=True)]

    def video_layout(self, call: Mapping[str, Any], output: Any) -> Layout:
        lengths = [len(video) for video in parts_of(output)]
        frames = call["pixel_values_videos"].shape[1]
        side = -(-self.side() // 2)
        structural = torch.zeros(sum(lengths), dtype=torch.bool, device=rows_of(output).device)
        structural[torch.tensor(lengths).cumsum(dim=0) - 1] = True
        return Layout(lengths, [((frames, side, side),)] * len(lengths), structural)

    def video_patches_to_tokens(self, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        videos, frames = call["pixel_values_videos"].shape[:2]
        pooled = self.base.apply_pooling(patches)
        pooled = pooled.reshape(videos, frames * pooled.shape[1], -1)
        return nn.functional.pad(pooled, (0, 0, 0, 1)).flatten(0, 1)
