"""Gemma 3 and PaliGemma: tokens of an image (or of the whole prefix) see each other in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.adapters.base import Adapter, Layout, parts_of, rows_of
from vtc.registry import register_adapter


class _GemmaAdapter(Adapter):
    builds_masks = True

    def tower(self, modality: str) -> nn.Module:
        return self.base.vision_tower

    def side(self) -> int:
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        lengths = [len(image) for image in parts_of(output)]
        side = round(lengths[0] ** 0.5)
        structural = torch.zeros(sum(lengths), dtype=torch.bool, device=rows_of(output).device)
        return Layout(lengths, [((1, side, side),)] * len(lengths), structural)


@register_adapter("gemma3")
class Gemma3Adapter(_GemmaAdapter):
    """Gemma 3: average-pooled patches; the tokens of each image form a block."""

    def cell(self, modality: str, call: Mapping[str, Any]) -> int:
        return self.side() // round(self.config.mm_tokens_per_image**0.5)

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        grid = patches.transpose(1, 2).unflatten(-1, (self.side(), self.side()))
        edge = round(self.config.mm_tokens_per_image**0.5)
        return nn.functional.avg_pool2d(grid, self.side() // edge).flatten(2).transpose(1, 2).flatten(0, 1)

    def blocks(self, call: Mapping[str, Any]) -> torch.Tensor | None:
        types = call.get("token_type_ids")
        if types is None:
            return None
        image = types == 1
        begins = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
        return torch.where(image, begins.long().cumsum(dim=1) - 1, -1)


@register_adapter("paligemma")
class PaliGemmaAdapter(_GemmaAdapter):
    """PaliGemma: the whole prefix, image and question, is one block."""

    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        return patches.flatten(0, 1)

    def blocks(self, call: Mapping[str, Any]) -> torch.Tensor | None:
        types, cache = call.get("token_type_ids"), call.get("cache")
        if cache is None:
            cache = call.get("past_key_values")  # the older name
        # The model's own condition for a prefix.
        first = cache is None or not cache.is_initialized or call.get("pixel_values") is not None
        return torch.where(types == 0, 0, -1) if types is not None and first else None
