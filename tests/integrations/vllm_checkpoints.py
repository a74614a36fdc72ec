"""Tiny checkpoints that vLLM loads: those of `tests.tiny` with wider decoders, each with a processor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny, tiny_processors

WIDTH = 128
HEAD = 32
"""vLLM's attention on CPUs has no smaller heads."""

IMAGE_ID = tiny.IMAGE

FAMILIES = ("llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "llava_next", "llava_onevision")


def config_of(family: str) -> Any:
    """The configuration of the tiny model of a family with a decoder of 4 heads of 32."""
    config = copy.deepcopy(tiny.ARCHITECTURES[family].config())
    text = config.text_config
    text.hidden_size, text.intermediate_size = WIDTH, 2 * WIDTH
    text.head_dim = HEAD
    if "mrope_section" in (text.rope_parameters or {}):
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
    vision = config.vision_config
    if hasattr(vision, "tokens_per_second"):
        # Behind a video, vLLM goes on after the largest position of any axis, and transformers (5.19, 5.24) after that
        # of rows and columns: they agree where time does not reach farther.
        vision.tokens_per_second = 1
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = WIDTH
    elif family == "qwen2_vl":
        vision.hidden_size = WIDTH
    return config


def write(family: str, folder: Path) -> Path:
    """Write a checkpoint of random weights and its processor to a folder."""
    config = config_of(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, tiny.ARCHITECTURES[family].model_class)(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor_of(family).save_pretrained(folder)
    if family in ("llava", "llava_next", "llava_onevision"):
        _older_names(folder / "model.safetensors")
    return folder


def processor_of(family: str) -> Any:
    """The processor of a family; those of images alone are not among `tests.tiny_processors`."""
    names = {"qwen2_5_vl": "qwen2_5_vl_video", "qwen2_vl": "qwen2_vl_video", "qwen3_vl": "qwen3_vl_video"}
    names |= {"llava_onevision": "llava_onevision_video", "internvl": "internvl"}
    if family in names:
        made = tiny_processors.processor(names[family])
        if family == "qwen3_vl":  # vLLM normalises frames as it does pictures
            made.image_processor.image_mean = made.image_processor.image_std = [0.5] * 3
        return made
    side = tiny_processors.SIDE
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    shared = {
        "tokenizer": tiny_processors.tokenizer(),
        "chat_template": tiny_processors.template("<image>", "<video>"),
        "patch_size": tiny_processors.PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if family == "llava":
        return transformers.LlavaProcessor(image_processor=transformers.CLIPImageProcessor(**crop), **shared)
    images = transformers.LlavaNextImageProcessor(image_grid_pinpoints=tiny_processors.PINPOINTS, **crop)
    return transformers.LlavaNextProcessor(image_processor=images, **shared)


def _older_names(file: Path) -> None:
    """Name the tower's weights as hub checkpoints do, which vLLM expects and transformers reads as well."""
    weights = {}
    for name, tensor in load_file(file).items():
        for tower in ("vision_tower.", "model.vision_tower."):
            if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
                name = f"{tower}vision_model.{name.removeprefix(tower)}"
        weights[name] = tensor
    save_file(weights, file, {"format": "pt"})
