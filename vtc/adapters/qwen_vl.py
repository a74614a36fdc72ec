"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and the hybrid Qwen3.5: packed towers, merged patches, (t, h, w) positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vtc.adapters.base import Adapter, Layout, TowerUnit, rows_of
from vtc.core.grids import Grid
from vtc.core.observations import Picture
from vtc.registry import register_adapter


@register_adapter("qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
class QwenVLAdapter(Adapter):
    """Towers that take all images in one sequence, in units of merge x merge patches; one unit becomes one token."""

    modalities = ("image", "video")
    multi_axis_positions = True
    resampling_refused = None

    def tower(self, modality: str) -> nn.Module:
        return self.base.visual

    def tower_width(self, modality: str) -> int | None:
        config: Any = self.base.visual.config  # in Qwen2-VL its `hidden_size` is the language model's
        return getattr(config, "embed_dim", None) or config.hidden_size

    def _grids(self, modality: str, call: Mapping[str, Any]) -> torch.Tensor:
        return call[f"{modality}_grid_thw"]

    def token_grids(self, modality: str, call: Mapping[str, Any]) -> list[Grid]:
        merge = self.base.visual.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in self._grids(modality, call).tolist()]

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        grids = self.token_grids(modality, call)
        lengths = [t * h * w for t, h, w in grids]
        structural = torch.zeros(sum(lengths), dtype=torch.bool, device=rows_of(output).device)
        return Layout(lengths, [(grid,) for grid in grids], structural)

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        return patches.flatten(0, 1).unflatten(0, (-1, self.base.visual.spatial_merge_size**2)).mean(dim=1)

    def tower_units(self, modality: str, call: Mapping[str, Any], crops: int, patches: int) -> list[TowerUnit]:
        size = self.base.visual.spatial_merge_size**2
        # A token is the mean of its patches, which are neighbours in the tower: their places follow from the mean.
        mean = self.patches_to_tokens(modality, call, torch.arange(patches, dtype=torch.float64)[None, :, None])
        inside = torch.arange(size)
        cells = (mean - (size - 1) / 2).round().long() + inside
        inputs = torch.arange(patches).view(-1, size)
        grids = self.token_grids(modality, call)
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

    def pictures(self, modality: str, call: Mapping[str, Any], crops: Sequence[torch.Tensor]) -> list[Picture] | None:
        """Put every picture or video together; of the frames that a patch reaches over, the first."""
        config, merge = self.base.visual.config, self.base.visual.spatial_merge_size
        found = []
        for crop, grid in zip(crops, self._grids(modality, call).tolist(), strict=True):
            t, h, w = grid
            frames = frames_of_patches(crop.flatten(1), grid, merge, config.patch_size, config.temporal_patch_size)
            places = torch.arange(t * h * w, device=crop.device).view(t, 1, 1, h, w)
            found.append(Picture(frames[:, 0], (h, w), patches_of_frames(places, merge, 1)[:, 0]))
        return found

    def resampled(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[tuple[torch.Tensor, int, int]]
    ) -> dict[str, Any]:
        """Take pictures apart into pixels, resample these as the family's processor does, and cut them into patches."""
        pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
        config = self.base.visual.config
        merge, edge, joined = self.base.visual.spatial_merge_size, config.patch_size, config.temporal_patch_size
        grids = self._grids(modality, call)
        parts = []
        for part, grid, (steps, rows, columns) in zip(
            call[pixels].split(grids.prod(dim=1).tolist()), grids.tolist(), sizes, strict=True
        ):
            smaller = (len(steps), rows * merge, columns * merge)
            if smaller != tuple(grid):
                frames = frames_of_patches(part, grid, merge, edge, joined)[steps.to(part.device)]
                resized = resample_frames(frames.flatten(0, 1), (smaller[1] * edge, smaller[2] * edge))
                part = patches_of_frames(resized.unflatten(0, frames.shape[:2]), merge, edge)
            parts.append(part)
        table = [(len(steps), rows * merge, columns * merge) for steps, rows, columns in sizes]
        return {pixels: torch.cat(parts), f"{modality}_grid_thw": grids.new_tensor(table)}

    def tower_sequences(self, modality: str, call: Mapping[str, Any]) -> list[torch.Tensor]:
        """Compute attention in single frames."""
        t, h, w = self._grids(modality, call).unbind(dim=1)
        return [(h * w).repeat_interleave(t)] * len(self.base.visual.blocks)


@register_adapter("qwen2_5_vl")
class Qwen2_5VLAdapter(QwenVLAdapter):
    """As Qwen2-VL, but the tower computes in windows and returns patches in the order of the windows."""

    lmms_eval = ("qwen2_5_vl", "simple.qwen2_5_vl.Qwen2_5_VL", "chat.qwen2_5_vl.Qwen2_5_VL")

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        units = super().patches_to_tokens(modality, call, patches)
        return units[self._windows(modality, call)[0].argsort().to(units.device)]

    def tower_sequences(self, modality: str, call: Mapping[str, Any]) -> list[torch.Tensor]:
        """Compute attention in windows, but in a few layers in whole frames."""
        frames, windows = super().tower_sequences(modality, call), self._windows(modality, call)[1].diff()
        whole = self.base.visual.fullatt_block_indexes
        return [each if layer in whole else windows for layer, each in enumerate(frames)]

    def _windows(self, modality: str, call: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the order of the cells in the tower, and the borders of its windows, in patches."""
        from transformers.vision_utils import get_vision_window_index

        visual = self.base.visual
        return get_vision_window_index(
            self._grids(modality, call),
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )


@register_adapter("qwen3_5", "qwen3_5_moe")
class Qwen3_5Adapter(QwenVLAdapter):
    """The hybrid: recurrent layers take no mask, so tokens may only be left out before the first layer."""

    decoder_stages_refused = (
        "three of four decoder layers are recurrent: what they have read of a token cannot be taken back later"
    )


def frames_of_patches(patches: torch.Tensor, grid: Sequence[int], merge: int, edge: int, joined: int) -> torch.Tensor:
    """Put patches together again.

    Parameters
    ----------
    patches : Tensor (t * h * w, C * joined * edge * edge)
        As the processor cuts them: cells of merge x merge patches in raster order.
    grid : (t, h, w)
        Of the patches.
    merge : int
        Patches along the edge of a cell.
    edge : int
        Pixels along the edge of a patch.
    joined : int
        Frames that a patch reaches over.

    Returns
    -------
    Tensor (t, joined, C, h * edge, w * edge)
    """
    t, h, w = grid
    cells = patches.view(t, h // merge, w // merge, merge, merge, -1, joined, edge, edge)
    return cells.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t, joined, -1, h * edge, w * edge)


def patches_of_frames(frames: torch.Tensor, merge: int, edge: int) -> torch.Tensor:
    """Undo `frames_of_patches`."""
    t, joined, channels, height, width = frames.shape
    cell = merge * edge
    cells = frames.reshape(t, joined, channels, height // cell, merge, edge, width // cell, merge, edge)
    return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * joined * edge**2)


def resample_frames(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resample frames (F, C, H, W) to a size, as Qwen2-VL's processor does: bicubic, with antialiasing."""
    wide = frames if frames.dtype == torch.float64 else frames.float()
    return nn.functional.interpolate(wide, size=size, mode="bicubic", antialias=True).to(frames.dtype)
