"""Values of patches arrive at the tokens that the patches become: windows, merges, pixel shuffle, tiles, pooling.

The tower's attention is silenced, which makes every feature a function of its own patches alone. Changing one pixel
then changes just the tokens that its patch went into, and that is where `patches_to_tokens` must put its value.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny
from vtc.registry import get_adapter


def silence(attentions: list[torch.nn.Module]) -> None:
    """Make attention modules answer zeros."""

    def zero(module: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    for attention in attentions:
        attention.register_forward_hook(zero)


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
def test_a_patch_arrives_where_its_pixels_do(family: tiny.Family) -> None:
    modality = family.modality
    case = tiny.build(family.name)
    adapter = get_adapter(case.model.config.model_type)(case.model)
    inputs = case.batch("ragged")
    names = ("pixel_values_videos",) if modality == "video" else ("pixel_values", "pixel_values_images")
    name = next(name for name in names if name in inputs)  # Video-LLaVA's images have been called both
    attentions = adapter.tower_attentions(modality)
    silence(attentions)
    entering: list[torch.Tensor] = []
    attentions[0].register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    encode = getattr(adapter.base, f"get_{modality}_features")
    accepted = ("image_grid_thw", "video_grid_thw", "image_sizes", "batch_num_images")
    call = {key: value for key, value in inputs.items() if key in accepted and key.startswith((modality, "batch"))}

    def features(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            pooled = encode(pixels, **call, return_dict=True).pooler_output
        parts = [pooled] if isinstance(pooled, torch.Tensor) else pooled
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

    pixels = inputs[name]
    plain = features(pixels)
    generator = torch.Generator().manual_seed(0)
    shown = pixels.flatten().nonzero()[:, 0]  # all-zero tiles are padding
    arrived = 0
    while arrived < 6:  # patches that are cropped away, and crops that are not used, arrive nowhere
        changed = pixels.clone()
        changed.view(-1)[shown[torch.randint(len(shown), (), generator=generator)]] += 5.0
        after = features(changed)
        before, now = entering[0], entering[-1]
        prefix = adapter.prefix_tokens(modality)
        touched = (before != now).any(dim=-1)
        touched = (touched[None] if touched.ndim == 1 else touched)[:, prefix:]
        values = adapter.patches_to_tokens(modality, {name: pixels, **call}, touched[..., None].float())
        assert values.shape == (len(plain), 1)
        expected = (plain != after).any(dim=-1)
        assert torch.equal(values[:, 0] > 0, expected)
        arrived += int(expected.any())
