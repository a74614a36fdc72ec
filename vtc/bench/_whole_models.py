"""Models whose vision towers have real shape, too: for the time of a whole call, from a picture to the first token.

Weights are random; decoders are built with a few layers, and their time is scaled to the depth of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from vtc.bench._models import BenchModel, around, llava_prompt, patches_prompt, qwen_3b_text
from vtc.errors import ConfigError

__all__ = ["WHOLE_MODELS", "WholeModel", "tiny"]


@dataclass(frozen=True)
class WholeModel(BenchModel):
    """A configuration with a vision tower of real shape.

    Attributes
    ----------
    visual_tokens : int
        Of a usual picture.
    side : callable
        (visual_tokens) to the side of the square picture, in pixels, that becomes about so many tokens.
    processor : class
        The image processor of the family.
    processing : dict
        Its arguments.
    """

    visual_tokens: int
    side: Callable[[int], int]
    processor: Callable[..., Any]
    processing: dict[str, Any]


def _llava_7b(layers: int) -> LlavaConfig:
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
    )
    return LlavaConfig(vision_config=tower, text_config=text, image_token_id=32000)


def _qwen2(layers: int, hidden: int, mlp: int, heads: int, groups: int, vocabulary: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
    )


def _onevision_7b(layers: int) -> LlavaOnevisionConfig:
    # SigLIP-so400m/384, of whose 27 layers the checkpoints run 26; Qwen2-7B.
    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(vision_config=tower, text_config=_qwen2(layers, 3584, 18944, 28, 4, 152064))


def _onevision_prompt(
    config: PreTrainedConfig, visual_tokens: int, text_tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    side = 384  # in patches 27
    tiles = next((n for n in range(1, 7) if _onevision_tokens(n) == visual_tokens), None)
    if tiles is None:
        known = ", ".join(str(_onevision_tokens(n)) for n in range(1, 7))
        raise ConfigError(f"A square LLaVA-OneVision picture is {known} tokens, got {visual_tokens}.")
    picture = torch.full((visual_tokens,), config.image_token_id)
    return {
        **around(text_tokens, picture, generator),
        "pixel_values": torch.randn(1, 1 + tiles**2, 3, side, side, generator=generator),
        "image_sizes": torch.tensor([[side * tiles, side * tiles]]),
    }


def _onevision_tokens(tiles: int) -> int:
    """Tokens of a picture of `tiles` x `tiles` tiles: the whole at 27 x 27, and its rows with a newline each."""
    return 27 * 27 + 27 * tiles * (27 * tiles + 1)


def _internvl(text: Qwen2Config) -> InternVLConfig:
    # InternViT-300M/448.
    tower = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    return InternVLConfig(vision_config=tower, text_config=text)


def _internvl_2b(layers: int) -> InternVLConfig:
    # Qwen2.5-1.5B, as in InternVL3-2B.
    return _internvl(_qwen2(layers, 1536, 8960, 12, 2, 151936))


def _internvl_8b(layers: int) -> InternVLConfig:
    # Qwen2.5-7B, as in InternVL3-8B.
    return _internvl(_qwen2(layers, 3584, 18944, 28, 4, 151936))


def _internvl_prompt(
    config: PreTrainedConfig, visual_tokens: int, text_tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    tiles, rest = divmod(visual_tokens, 256)
    if rest or not tiles:
        raise ConfigError(f"An InternVL tile is 256 tokens, so visual tokens must be a multiple, got {visual_tokens}.")
    picture = torch.full((visual_tokens,), config.image_token_id)
    pixels = torch.randn(tiles, 3, 448, 448, generator=generator)
    return {**around(text_tokens, picture, generator), "pixel_values": pixels}


# The tower of Qwen2.5-VL-3B and -7B.
_QWEN2_5_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def _qwen2_5_3b(layers: int) -> Qwen2_5_VLConfig:
    return qwen_3b_text(layers, _QWEN2_5_TOWER)


def _qwen2_5_7b(layers: int) -> Qwen2_5_VLConfig:
    config = qwen_3b_text(layers, {**_QWEN2_5_TOWER, "out_hidden_size": 3584})
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    text = {**config.text_config.to_dict(), **sizes, "vocab_size": 152064}
    return Qwen2_5_VLConfig(text_config=text, vision_config=config.vision_config.to_dict(), tie_word_embeddings=False)


def _qwen3_4b(layers: int) -> Qwen3VLConfig:
    # The tower of Qwen3-VL-2B and -4B.
    return Qwen3VLConfig(
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        vision_config={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    )


def _internvl_side(tokens: int) -> int:
    return round(448 * (tokens / 256) ** 0.5)


_INTERNVL_PROCESSING = {"crop_to_patches": True, "max_patches": 12, "size": {"height": 448, "width": 448}}


def _qwen2_5_side(tokens: int) -> int:
    return round(28 * tokens**0.5)


WHOLE_MODELS = {
    model.name: model
    for model in (
        WholeModel(
            "llava-1.5-7b", 32, _llava_7b, llava_prompt, "vtc-cls", 576,
            lambda tokens: 336, CLIPImageProcessor,
            {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        ),
        WholeModel(
            "llava-onevision-7b", 28, _onevision_7b, _onevision_prompt, "divprune", 1485,
            lambda tokens: 384 * next(n for n in range(1, 7) if _onevision_tokens(n) == tokens),
            LlavaOnevisionImageProcessor, {},
        ),
        WholeModel(
            "internvl3-2b", 28, _internvl_2b, _internvl_prompt, "divprune", 1024,
            _internvl_side, GotOcr2ImageProcessor, _INTERNVL_PROCESSING,
        ),
        WholeModel(
            "internvl3-8b", 28, _internvl_8b, _internvl_prompt, "divprune", 1024,
            _internvl_side, GotOcr2ImageProcessor, _INTERNVL_PROCESSING,
        ),
        WholeModel(
            "qwen2.5-vl-3b", 36, _qwen2_5_3b, patches_prompt, "divprune", 576,
            _qwen2_5_side, Qwen2VLImageProcessor, {},
        ),
        WholeModel(
            "qwen2.5-vl-7b", 28, _qwen2_5_7b, patches_prompt, "divprune", 1296,
            _qwen2_5_side, Qwen2VLImageProcessor, {},
        ),
        WholeModel(
            "qwen3-vl-4b", 36, _qwen3_4b, patches_prompt, "divprune", 576,
            lambda tokens: round(32 * tokens**0.5), Qwen2VLImageProcessor, {"patch_size": 16},
        ),
    )
}  # fmt: skip
"""By name."""

_TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
_TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_hidden_layers": 8,  # as many as the default of vtc-cls requires
    "depth": 8,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [3, 7],
    "deepstack_visual_indexes": [1, 3, 5],
}
_TINY_TOKENS = {"internvl3-2b": 256, "internvl3-8b": 256, "qwen2.5-vl-3b": 64, "qwen2.5-vl-7b": 64, "qwen3-vl-4b": 64}


def tiny(shape: WholeModel) -> WholeModel:
    """Return the same family with the same patches and ids, and with widths and depths that a CPU runs in no time."""
    return replace(
        shape,
        full_depth=2,
        config=partial(_shrunk, shape.config),
        visual_tokens=_TINY_TOKENS.get(shape.name, shape.visual_tokens),
    )


def _shrunk(config: Callable[[int], PreTrainedConfig], layers: int) -> PreTrainedConfig:
    whole = config(layers)
    parts = whole.to_dict()
    for name, sizes in (("text_config", _TINY_TEXT), ("vision_config", _TINY_TOWER)):
        part = parts[name]
        part.update({key: value for key, value in sizes.items() if key in part})
        if "mrope_section" in (part.get("rope_parameters") or {}):
            part["rope_parameters"]["mrope_section"] = [2, 3, 3]
    return type(whole).from_dict(parts)
