"""Models with decoders of real shape and random weights, and prompts for them.

The vision towers are tiny, but for those of `vtc.bench._whole_models`: they emit the right number of tokens at
negligible cost, so that the time of a prefill is that of the decoder. The projector has its real size. All classes are
those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
)

from vtc.errors import ConfigError
from vtc.report.report import Report

LLAVA_TOKENS_PER_IMAGE = 576
_CLIP_SIDE, _CLIP_PATCH = 336, 14
_QWEN_PATCH, _QWEN_MERGE, _QWEN_FRAMES = 14, 2, 2


@dataclass(frozen=True)
class BenchModel:
    """A configuration and prompts for it.

    Attributes
    ----------
    name : str
    full_depth : int
        Number of decoder layers of the checkpoint of this shape.
    config : callable
        (layers) to configuration.
    prompt : callable
        (config, visual_tokens, text_tokens, generator) to model inputs, as a processor returns them.
    method : str
        Default method to measure.
    """

    name: str
    full_depth: int
    config: Callable[[int], PreTrainedConfig]
    prompt: Callable[[PreTrainedConfig, int, int, torch.Generator], dict[str, torch.Tensor]]
    method: str


def build(model: BenchModel, layers: int, dtype: torch.dtype, device: str, *, attention: str | None = None) -> Any:
    """Build the model with `layers` decoder layers and random weights, in evaluation mode.

    Weights are drawn on the device: on a CPU those of 7B parameters take minutes. `attention` is the implementation of
    transformers, by default that of the family.
    """
    config = model.config(layers)
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(0)
        built = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return built.to(device).eval()


def prompt(
    model: BenchModel, built: Any, visual_tokens: int, text_tokens: int, *, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Return inputs of one row: half of the text, the images, the other half; the same in every run with a `seed`."""
    inputs = model.prompt(built.config, visual_tokens, text_tokens, torch.Generator().manual_seed(seed))
    floating = {name: x.to(built.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return {name: x.to(built.device) for name, x in floating.items()}


def plain_prompt(built: Any, tokens: int) -> dict[str, torch.Tensor]:
    """Return inputs of one row of text only."""
    ids = _text(tokens, torch.Generator().manual_seed(1))[None]
    return {"input_ids": ids.to(built.device), "attention_mask": torch.ones_like(ids).to(built.device)}


def packed_length(report: Report) -> int:
    """Return the number of tokens of the only row after compression, the length of the text prompt to compare with.

    Raises
    ------
    ConfigError
        The method drops tokens inside the decoder, so that no text prompt has its length in every layer.
    """
    lengths = {layer[0] for layer in report.lengths_per_layer}
    if len(lengths) > 1:
        raise ConfigError(
            f"{report.configs[0].method} drops tokens inside the decoder; benchmarks compare with a plain prompt of "
            "the packed length, so choose a method that drops them before it (vtc methods)."
        )
    return lengths.pop()


def _text(tokens: int, generator: torch.Generator) -> torch.Tensor:
    # Below all special and placeholder ids of these configurations.
    return torch.randint(1000, 20000, (tokens,), generator=generator)


def around(text_tokens: int, picture: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the ids of a prompt of one row, half of the text in front of the picture."""
    half = text_tokens // 2
    ids = torch.cat([_text(half, generator), picture, _text(text_tokens - half, generator)])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _llava(text: LlamaConfig) -> LlavaConfig:
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,  # as many as the default of vtc-cls requires
        num_attention_heads=2,
        image_size=_CLIP_SIDE,
        patch_size=_CLIP_PATCH,
        projection_dim=64,
    )
    return LlavaConfig(vision_config=tower, text_config=text, image_token_id=32000)


def _llava_7b(layers: int) -> LlavaConfig:
    # LLaVA-1.5-7B: Vicuna-7B's decoder, vocabulary padded to 32 064.
    return _llava(
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=layers,
            num_attention_heads=32,
            vocab_size=32064,
            max_position_embeddings=4096,
        )
    )


def _llava_150m(layers: int) -> LlavaConfig:
    # Not the shape of a checkpoint: 12 layers and the two vocabulary matrices make 156 M parameters.
    return _llava(
        LlamaConfig(
            hidden_size=768,
            intermediate_size=2816,
            num_hidden_layers=layers,
            num_attention_heads=12,
            vocab_size=32064,
            max_position_embeddings=4096,
        )
    )


def llava_prompt(
    config: PreTrainedConfig, visual_tokens: int, text_tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return a prompt of LLaVA-1.5 with as many pictures as make so many tokens."""
    images, rest = divmod(visual_tokens, LLAVA_TOKENS_PER_IMAGE)
    if rest or not images:
        raise ConfigError(
            f"A LLaVA-1.5 image is {LLAVA_TOKENS_PER_IMAGE} tokens, so visual tokens must be a multiple of that, "
            f"got {visual_tokens}."
        )
    picture = torch.full((visual_tokens,), config.image_token_id)
    pixels = torch.randn(images, 3, _CLIP_SIDE, _CLIP_SIDE, generator=generator)
    return {**around(text_tokens, picture, generator), "pixel_values": pixels}


_TINY_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "fullatt_block_indexes": []}


def qwen_3b_text(layers: int, tower: dict[str, Any]) -> Qwen2_5_VLConfig:
    """Return the configuration of Qwen2.5-VL-3B's decoder behind a tower."""
    # Qwen2.5-VL-3B: 16 query heads over 2 key-value heads, tied vocabulary.
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "out_hidden_size": 2048,
            "patch_size": _QWEN_PATCH,
            "spatial_merge_size": _QWEN_MERGE,
            "temporal_patch_size": _QWEN_FRAMES,
            **tower,
        },
        tie_word_embeddings=True,
    )


def _qwen_3b(layers: int) -> Qwen2_5_VLConfig:
    return qwen_3b_text(layers, _TINY_TOWER)


def _qwen_grid(visual_tokens: int) -> tuple[int, int]:
    """Return the most nearly square (rows, columns) of exactly so many merged tokens."""
    rows = next(rows for rows in range(math.isqrt(visual_tokens), 0, -1) if visual_tokens % rows == 0)
    return rows, visual_tokens // rows


def patches_prompt(
    config: PreTrainedConfig, visual_tokens: int, text_tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return a prompt of the Qwen families, whose patches come as rows of one sequence."""
    vision: Any = config.vision_config
    rows, columns = (vision.spatial_merge_size * side for side in _qwen_grid(visual_tokens))
    picture = torch.full((visual_tokens,), config.image_token_id)
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = around(text_tokens, picture, generator)
    return {
        **inputs,
        "mm_token_type_ids": (inputs["input_ids"] == config.image_token_id).int(),
        "pixel_values": torch.randn(rows * columns, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


LLAVA_7B = BenchModel("llava-1.5-7b", 32, _llava_7b, llava_prompt, "vtc-cls")
QWEN_3B = BenchModel("qwen2.5-vl-3b", 36, _qwen_3b, patches_prompt, "divprune")
LLAVA_150M = BenchModel("llava-150m", 12, _llava_150m, llava_prompt, "vtc-cls")
