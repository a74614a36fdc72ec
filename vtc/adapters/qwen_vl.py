"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and the hybrid Qwen3.5: packed towers, merged patches, (t, h, w) positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.adapters.base import Adapter, Layout, TowerUnit, rows_of
from vtc.core.grids import Grid
from vtc.registry import register_adapter


@register_adapter("qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
class QwenVLAdapter(Adapter):
    """Towers that take all images in one sequence, in units of merge x merge patches; one unit becomes one token."""

    modalities = ("image", "video")
    multi_axis_positions = True

    def tower(self, modality: str) -> nn.Module:
        return self.base.visual

    def _grids(self, modality: str, call: Mapping[str, Any]) -> torch.Tensor:
        return call[f"{modality}_grid_thw"]

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        merge = self.base.visual.spatial_merge_size
        grids = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in self._grids(modality, call)]
        lengths = [t * h * w for t, h, w in grids]
        structural = torch.zeros(sum(lengths), dtype=torch.bool, device=rows_of(output).device)
        return Layout(lengths, [(grid,) for grid in grids], structural)

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        return patches.flatten(0, 1).unflatten(0, (-1, self.base.visual.spatial_merge_size**2)).mean(dim=1)

    def tower_units(self, modality: str, call: Mapping[str, Any], crops: int, patches: int) -> list[TowerUnit]:
        merge = self.base.visual.spatial_merge_size
        size = merge**2
        # A token is the mean of its patches, which are neighbours in the tower: their places follow from the mean.
        mean = self.patches_to_tokens(modality, call, torch.arange(patches, dtype=torch.float64)[None, :, None])
        inside = torch.arange(size)
        cells = (mean - (size - 1) / 2).round().long() + inside
        inputs = torch.arange(patches).view(-1, size)
        grids: list[Grid] = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in self._grids(modality, call)]
        lengths = [t * h * w for t, h, w in grids]
        parts = zip(cells.split(lengths), inputs.split(lengths), grids, strict=True)
        return [TowerUnit(0, tower, given, grid) for tower, given, grid in parts]

    def tower_outlets(self, modality: str) -> list[nn.Module]:
        return [self.base.visual.merger, *getattr(self.base.visual, "deepstack_merger_list", ())]

    def input_patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        # Not `self`: a subclass whose tower reorders patches does so after they have entered.
        return QwenVLAdapter.patches_to_tokens(self, modality, call, patches)

    def patch_pixels(
        self, modality: str, call: Mapping[str, Any], pixels: torch.Tensor
    ) -> tuple[list[torch.Tensor], tuple[int, int] | None]:
        """Take `pixels` as rows (M, C * P), one image after the other."""
        return list(pixels.unflatten(1, (3, -1)).split(self._grids(modality, call).prod(dim=1).tolist())), None


@register_adapter("qwen2_5_vl")
class Qwen2_5VLAdapter(QwenVLAdapter):
    """As Qwen2-VL, but the tower computes in windows and returns patches in the order of the windows."""

    lmms_eval = ("qwen2_5_vl", "simple.qwen2_5_vl.Qwen2_5_VL", "chat.qwen2_5_vl.Qwen2_5_VL")

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        from transformers.vision_utils import get_vision_window_index

        visual = self.base.visual
        order, _ = get_vision_window_index(
            self._grids(modality, call),
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        units = super().patches_to_tokens(modality, call, patches)
        return units[order.argsort().to(units.device)]


@register_adapter("qwen3_5")
class Qwen3_5Adapter(QwenVLAdapter):
    """The hybrid: recurrent layers take no mask, so tokens may only be left out before the first layer."""

    decoder_stages_refused = (
        "three of four decoder layers are recurrent: what they have read of a token cannot be taken back later"
    )
