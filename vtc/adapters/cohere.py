"""Aya Vision and Command A Vision: tiles with text between them, pixel shuffle in the projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vtc.adapters.base import Layout, parts_of
from vtc.adapters.llava import CropAdapter
from vtc.registry import register_adapter


@register_adapter("aya_vision", "cohere2_vision")
class CohereVisionAdapter(CropAdapter):
    """Aya Vision (arXiv 2505.08751) and Command A Vision: every tile of an image is a segment of the prompt."""

    view_layout = "separate tiles"

    def cell(self, modality: str, call: Mapping[str, Any]) -> int:
        factor: int = self.config.downsample_factor
        return factor

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        tiles = parts_of(output)
        side = self.side() // self.config.downsample_factor
        return Layout.tiles(len(tiles), (side, side), tiles[0].device)

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        shuffled = self.base.multi_modal_projector.pixel_shuffle(patches)
        # Pixel shuffle concatenates the patches that become one token along the channels.
        return shuffled.unflatten(-1, (-1, patches.shape[-1])).mean(dim=-2).flatten(0, 2)
