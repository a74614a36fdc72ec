"""GLM-4.1V: packed tower and (t, h, w) positions as in Qwen2-VL, one placeholder for images and videos."""

from __future__ import annotations

import torch

from vtc.adapters.qwen_vl import QwenVLAdapter
from vtc.registry import register_adapter


@register_adapter("glm4v", "glm4v_moe", "glm46v")
class Glm4vAdapter(QwenVLAdapter):
    """GLM-4.1V (arXiv 2507.01006): a video is its frames as images, with times between them, inside video markers."""

    def token_id(self, modality: str) -> int | None:
        placeholder: int = self.config.image_token_id  # transformers never puts `video_token_id` into a prompt
        return placeholder

    def placeholders(self, ids: torch.Tensor, modality: str) -> torch.Tensor:
        # As transformers' processor tells the modalities apart for the positions.
        begun = (ids == self.config.video_start_token_id).cumsum(dim=1)
        ended = (ids == self.config.video_end_token_id).cumsum(dim=1)
        return (ids == self.config.image_token_id) & ((begun > ended) == (modality == "video"))
