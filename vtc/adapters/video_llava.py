"""Video-LLaVA: separate towers for images and videos; video frames keep their [CLS] token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from vtc.adapters.base import Layout, parts_of
from vtc.adapters.llava import CropAdapter
from vtc.registry import register_adapter


@register_adapter("video_llava")
class VideoLlavaAdapter(CropAdapter):
    """Video-LLaVA (arXiv 2311.10122)."""

    modalities = ("image", "video")

    @classmethod
    def fit(cls, modality: str) -> Literal["crop", "pad", "stretch"]:
        return "crop"

    def tower(self, modality: str) -> nn.Module:
        return self.base.video_tower if modality == "video" else self.base.image_tower

    def _prefix(self, modality: str, call: Mapping[str, Any]) -> int:
        kept = modality == "video" or self.keeps_prefix(call)
        return self.prefix_tokens(modality) if kept else 0

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        parts = parts_of(output)
        crops, tokens = len(parts), len(parts[0])
        frames = call["pixel_values_videos"].shape[1] if modality == "video" else 1
        prefix = self._prefix(modality, call)
        structural = torch.zeros(crops, tokens, dtype=torch.bool, device=parts[0].device)
        structural[:, :prefix] = True
        grid = (frames, self.side(), self.side())
        return Layout([frames * tokens] * (crops // frames), [(grid,)] * (crops // frames), structural.flatten())

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(patches, (0, 0, self._prefix(modality, call), 0)).flatten(0, 1)
