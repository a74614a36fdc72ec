"""The placeholders that adapters find in a prompt are those that the family's own processor marks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from tests import tiny
from tests.tiny_processors import processor
from vtc.registry import get_adapter


@pytest.mark.parametrize("family", ["qwen2_5_vl_video", "glm4v_video"])
def test_images_and_videos_are_told_apart(family: str) -> None:
    model, words = tiny.build(family).model, processor(family)
    shown = {"image": np.zeros((16, 16, 3), dtype=np.uint8), "video": np.zeros((4, 16, 16, 3), dtype=np.uint8)}
    content = [{"type": name} for name in ("image", "video", "image", "video")]
    text = words.apply_chat_template([{"role": "user", "content": content}])
    inputs = words(
        text=[text],
        images=[shown["image"]] * 2,
        videos=[shown["video"]] * 2,
        video_metadata=[VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])] * 2,
        do_sample_frames=False,
        return_tensors="pt",
    )
    adapter = get_adapter(model.config.model_type)(model)
    for number, modality in enumerate(("image", "video"), start=1):
        expected = inputs["mm_token_type_ids"] == number
        assert expected.any()
        assert torch.equal(adapter.placeholders(inputs["input_ids"], modality), expected)
