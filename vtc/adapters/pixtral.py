"""Mistral Small 3, and Pixtral's tower, which packs pictures of any size into one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.adapters.base import Adapter, Layout, TowerUnit, rows_of
from vtc.registry import register_adapter

__all__ = ["Mistral3Adapter", "packed_lengths", "packed_pictures", "packed_units"]


@register_adapter("mistral3")
class Mistral3Adapter(Adapter):
    """Mistral Small 3.1 and later: merge x merge patches become one token, and text ends every row of these."""

    resampling_refused = "its prompts have a token at the end of every row of a picture"

    def tower(self, modality: str) -> nn.Module:
        return self.base.vision_tower

    def packed_lengths(self, modality: str, call: Mapping[str, Any]) -> list[int] | None:
        return packed_lengths(self.base.vision_tower, call)

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        grids = [unit.grid for unit in self._units(call)]
        rows = rows_of(output)
        structural = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        return Layout([h * w for _, h, w in grids], [(grid,) for grid in grids], structural)

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        cells = torch.cat([unit.cells for unit in self._units(call)])
        return patches[0, cells.to(patches.device)].mean(dim=1)

    def tower_units(self, modality: str, call: Mapping[str, Any], crops: int, patches: int) -> list[TowerUnit]:
        return self._units(call)

    def patch_pixels(
        self, modality: str, call: Mapping[str, Any], pixels: torch.Tensor
    ) -> tuple[list[torch.Tensor], tuple[int, int] | None]:
        return packed_pictures(self.base.vision_tower, call, pixels)

    def _units(self, call: Mapping[str, Any]) -> list[TowerUnit]:
        return packed_units(self.base.vision_tower, call, self.config.spatial_merge_size)


def packed_units(tower: Any, call: Mapping[str, Any], merge: int = 1) -> list[TowerUnit]:
    """Divide what Pixtral's tower sees, one sequence of all pictures of a call, into these pictures.

    Parameters
    ----------
    tower : PixtralVisionModel
    call : mapping
        Arguments of `get_image_features`, with `image_sizes`.
    merge : int
        Patches along the edge of what becomes one token; patches that fill no such square become none.
    """
    units, start = [], 0
    for rows, columns in _patch_grids(tower, call):
        places = torch.arange(start, start + rows * columns).view(rows, columns)
        cells = places.unfold(0, merge, merge).unfold(1, merge, merge)
        table = cells.reshape(-1, merge * merge)
        units.append(TowerUnit(0, table, table, (1, cells.shape[0], cells.shape[1])))
        start += rows * columns
    return units


def packed_pictures(
    tower: Any, call: Mapping[str, Any], pixels: torch.Tensor
) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """Cut the padding off the pictures that Pixtral's tower is given, and say how large its patches are."""
    edge, grids = tower.patch_size, _patch_grids(tower, call)
    crops = [
        picture[:, : rows * edge, : columns * edge] for picture, (rows, columns) in zip(pixels, grids, strict=True)
    ]
    return crops, (edge, edge)


def packed_lengths(tower: Any, call: Mapping[str, Any]) -> list[int]:
    """Count the patches of every picture that Pixtral's tower is given."""
    return [rows * columns for rows, columns in _patch_grids(tower, call)]


def _patch_grids(tower: Any, call: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [(int(height) // tower.patch_size, int(width) // tower.patch_size) for height, width in call["image_sizes"]]
