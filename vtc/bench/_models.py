"""Decoders of real shape behind a tiny vision tower, with random weights, and prompts for them.

The towers emit the right number of tokens of the right width and cost next to nothing, so that a prefill's time is the
decoder's time. The projector has its real size. Everything is a stock transformers class.
"""

from __future__ import annotations

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
# Merged (rows, columns) of one image, by visual tokens.
_QWEN_GRIDS = {576: (24, 24), 2880: (48, 60)}


@dataclass(frozen=True)
class BenchModel:
    """A configuration and the prompts that fit it.

    Attributes
    ----------
    name : str
    full_depth : int
        Decoder layers of the checkpoint that the shape is taken from.
    config : callable
        (layers) to configuration.
    prompt : callable
        (config, visual_tokens, text_tokens, generator) to model inputs; the tensors a processor would make.
    method : str
        The method to measure unless another is asked for.
    """

    name: str
    full_depth: int
    config: Callable[[int], PreTrainedConfig]
    prompt: Callable[[PreTrainedConfig, int, int, torch.Generator], dict[str, torch.Tensor]]
    method: str


def build(model: BenchModel, layers: int, dtype: torch.dtype, device: str) -> Any:
    """The model with `layers` decoder layers, random weights, in evaluation mode."""
    config = model.config(layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return built.to(device).eval()


def prompt(model: BenchModel, built: Any, visual_tokens: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """Inputs of one row: half of the text, the picture or pictures, the other half; the same in every run."""
    inputs = model.prompt(built.config, visual_tokens, text_tokens, torch.Generator().manual_seed(1))
    floating = {name: x.to(built.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return {name: x.to(built.device) for name, x in floating.items()}


def plain_prompt(built: Any, tokens: int) -> dict[str, torch.Tensor]:
    """Inputs of one row of text alone."""
    ids = _text(tokens, torch.Generator().manual_seed(1))[None]
    return {"input_ids": ids.to(built.device), "attention_mask": torch.ones_like(ids).to(built.device)}


def packed_length(report: Report) -> int:
    """Tokens of the report's only row behind compression: the length of the plain prompt to compare with.

    Raises
    ------
    ConfigError
        The method drops tokens inside the decoder, so that no plain prompt has its length in every layer.
    """
    lengths = {layer[0] for layer in report.lengths_per_layer}
    if len(lengths) > 1:
        raise ConfigError(
            f"{report.configs[0].method} drops tokens inside the decoder; benchmarks compare with a plain prompt of "
            "the packed length, so choose a method that drops them before it (vtc methods)."
        )
    return lengths.pop()


def _text(tokens: int, generator: torch.Generator) -> torch.Tensor:
    # Well below every special and placeholder id of the configurations here.
    return torch.randint(1000, 20000, (tokens,), generator=generator)


def _around(text_tokens: int, picture: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    half = text_tokens // 2
    ids = torch.cat([_text(half, generator), picture, _text(text_tokens - half, generator)])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _llava(text: LlamaConfig) -> LlavaConfig:
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,  # what vtc-cls reads by default
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
    # No checkpoint's shape: 12 layers and the two vocabulary matrices make 156 M parameters.
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


def _llava_prompt(
    config: PreTrainedConfig, visual_tokens: int, text_tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    images, rest = divmod(visual_tokens, LLAVA_TOKENS_PER_IMAGE)
    if rest or not images:
        raise ConfigError(
            f"A LLaVA-1.5 image is {LLAVA_TOKENS_PER_IMAGE} tokens, so visual tokens must be a multiple of that, "
            f"got {visual_tokens}."
        )
    picture = torch.full((visual_tokens,), config.image_token_id)
    pixels = torch.randn(images, 3, _CLIP_SIDE, _CLIP_SIDE, generator=generator)
    return {**_around(text_tokens, picture, generator), "pixel_values": pixels}


def _qwen_3b(layers: int) -> Qwen2_5_VLConfig:
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
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 2048,
            "patch_size": _QWEN_PATCH,
            "spatial_merge_size": _QWEN_MERGE,
            "temporal_patch_size": _QWEN_FRAMES,
            "fullatt_block_indexes": [],
        },
        tie_word_embeddings=True,
    )


def _qwen_prompt(
    config: PreTrainedConfig, visual_tokens: int, text_tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    if visual_tokens not in _QWEN_GRIDS:
        raise ConfigError(f"Visual tokens of a Qwen prompt must be one of {sorted(_QWEN_GRIDS)}, got {visual_tokens}.")
    rows, columns = (_QWEN_MERGE * side for side in _QWEN_GRIDS[visual_tokens])
    picture = torch.full((visual_tokens,), config.image_token_id)
    patches = torch.randn(rows * columns, 3 * _QWEN_FRAMES * _QWEN_PATCH**2, generator=generator)
    inputs = _around(text_tokens, picture, generator)
    return {
        **inputs,
        "mm_token_type_ids": (inputs["input_ids"] == config.image_token_id).int(),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


LLAVA_7B = BenchModel("llava-1.5-7b", 32, _llava_7b, _llava_prompt, "vtc-cls")
QWEN_3B = BenchModel("qwen2.5-vl-3b", 36, _qwen_3b, _qwen_prompt, "divprune")
LLAVA_150M = BenchModel("llava-150m", 12, _llava_150m, _llava_prompt, "vtc-cls")
