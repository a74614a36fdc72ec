"""LLaVA 1.5 and models of its shape: one tower, square crops, a projector that keeps one token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from vtc.adapters.base import Adapter, Layout, TowerUnit, parts_of, rows_of
from vtc.adapters.pixtral import packed_lengths, packed_pictures, packed_units
from vtc.core.grids import Grid
from vtc.registry import register_adapter


class CropAdapter(Adapter):
    """Families whose towers see square crops of one size, as in LLaVA."""

    def tower(self, modality: str) -> nn.Module:
        return self.base.vision_tower

    def side(self) -> int:
        """Count the patches along a crop's edge."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def keeps_prefix(self, call: Mapping[str, Any]) -> bool:
        """Say whether [CLS] stays among the features."""
        strategy = call.get("vision_feature_select_strategy")
        return (self.config.vision_feature_select_strategy if strategy is None else strategy) == "full"


@register_adapter("llava")
class LlavaAdapter(CropAdapter):
    """LLaVA 1.5 (arXiv 2310.03744) with any tower that cuts an image into a grid."""

    lmms_eval = ("llava_hf", "simple.llava_hf.LlavaHf", "chat.llava_hf.LlavaHf")

    @classmethod
    def fit(cls, modality: str) -> Literal["crop", "pad", "stretch"]:
        return "crop"

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        lengths = [len(image) for image in parts_of(output)]
        prefix, lost = self._prefix_and_loss(modality, call)
        sizes = call.get("image_sizes")
        structural: list[bool] = []
        grids: list[tuple[Grid, ...]] = []
        for index, length in enumerate(lengths):
            if sizes is not None:  # towers for any image size, one patch grid per image
                height, width = (int(edge) // int(self.base.vision_tower.patch_size) for edge in sizes[index])
            elif lost:  # one patch short of a rectangle
                height, width = 1, length
            else:
                height = width = round((length - prefix) ** 0.5)
            grids.append(((1, height, width),))
            structural += [True] * prefix + [False] * (length - prefix)
        return Layout(lengths, grids, torch.tensor(structural, device=rows_of(output).device))

    def packed_lengths(self, modality: str, call: Mapping[str, Any]) -> list[int] | None:
        return packed_lengths(self.base.vision_tower, call) if call.get("image_sizes") is not None else None

    def tower_units(self, modality: str, call: Mapping[str, Any], crops: int, patches: int) -> list[TowerUnit]:
        if call.get("image_sizes") is not None:
            return packed_units(self.base.vision_tower, call)
        return super().tower_units(modality, call, crops, patches)

    def patch_pixels(
        self, modality: str, call: Mapping[str, Any], pixels: torch.Tensor
    ) -> tuple[list[torch.Tensor], tuple[int, int] | None]:
        if call.get("image_sizes") is not None:
            return packed_pictures(self.base.vision_tower, call, pixels)
        return super().patch_pixels(modality, call, pixels)

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        prefix, lost = self._prefix_and_loss(modality, call)
        return nn.functional.pad(patches[:, lost:], (0, 0, prefix, 0)).flatten(0, 1)

    def _prefix_and_loss(self, modality: str, call: Mapping[str, Any]) -> tuple[int, int]:
        """Count the non-patch tokens left before the features, and the patches cut off there.

        The "default" strategy cuts off the first token of the tower whether or not that is a [CLS].
        """
        prefix, cut = self.prefix_tokens(modality), 0 if self.keeps_prefix(call) else 1
        return max(prefix - cut, 0), max(cut - prefix, 0)
