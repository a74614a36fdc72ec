"""Processors for the tiny models of `tests.tiny`, so that pictures and clips can be given to them as files are.

The words mean nothing to random weights: what the models answer is good for telling one input from another, not more.
"""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests import tiny

WORDS = ("what", "happens", "in", "the", "clip", "?", "describe", "a", "b", "c", "seconds", "<", ">", ".", "[", "]")
SIDE, PATCH = 32, 8
QWEN = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]

TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} : {% endif %}"
)

VIDEO_FAMILIES = (
    "llava_next_video",
    "llava_onevision_video",
    "video_llava",
    "qwen2_vl_video",
    "qwen2_5_vl_video",
    "qwen3_vl_video",
    "qwen3_5",
    "glm4v_video",
    "internvl",
)
"""Names of `tests.tiny.FAMILIES` whose models take videos."""


def tokenizer(image: str = "<image>", video: str = "<video>", **roles: str) -> Any:
    """One word per token, with the special ids of the tiny models; `roles` name some of them (`start_image_token`)."""
    words = [f"w{index}" for index in range(tiny.VOCAB)]
    words[:4] = "<pad>", "<s>", "</s>", "<unk>"
    words[10 : 10 + len(WORDS)] = WORDS
    named = {290: "<img>", 291: "</img>", tiny.VISION_START: "<|vision_start|>", tiny.VISION_END: "<|vision_end|>"}
    named |= {tiny.VIDEO_START: "<|begin_of_video|>", tiny.VIDEO_END: "<|end_of_video|>"}
    named |= {294: "<|begin_of_image|>", 295: "<|end_of_image|>"}
    named |= {tiny.VIDEO: video, tiny.IMAGE: image}
    for index, word in named.items():
        words[index] = word
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=roles or list(named.values()),
    )


def template(image: str, video: str) -> str:
    return TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def processor(family: str) -> Any:
    """The processor of a line of `VIDEO_FAMILIES`."""
    kind = tiny.family(family).architecture
    if kind.startswith("qwen"):
        return _qwen(kind)
    if kind == "glm4v_video":
        return _glm4v()
    if kind == "internvl":
        return _internvl()
    words = tokenizer()
    shared = {"tokenizer": words, "chat_template": template("<image>", "<video>")}
    crop = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if kind == "llava_onevision":
        return transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessor(
                size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
            ),
            video_processor=transformers.LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE}),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            **shared,
        )
    if kind == "video_llava":
        return transformers.VideoLlavaProcessor(
            image_processor=transformers.VideoLlavaImageProcessor(**crop),
            video_processor=transformers.VideoLlavaVideoProcessor(**crop),
            patch_size=PATCH,
            **shared,
        )
    return transformers.LlavaNextVideoProcessor(
        image_processor=transformers.LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **crop),
        video_processor=transformers.LlavaNextVideoVideoProcessor(**crop),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **shared,
    )


def _qwen(kind: str) -> Any:
    old = kind in ("qwen2_vl", "qwen2_5_vl")
    size = (
        {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
        if old
        else {"shortest_edge": 64, "longest_edge": 32 * 32 * 64}
    )
    image, video = "<|image_pad|>", "<|video_pad|>"
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}
    videos = transformers.Qwen2VLVideoProcessor if old else transformers.Qwen3VLVideoProcessor
    wrapped = [f"<|vision_start|>{token}<|vision_end|>" for token in (image, video)]
    return getattr(transformers, f"{names.get(kind, 'Qwen3VL')}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**QWEN, size={"shortest_edge": 64, "longest_edge": 32 * 32}),
        video_processor=videos(**QWEN, size=size),
        tokenizer=tokenizer(image, video),
        chat_template=template(*wrapped),
    )


def _glm4v() -> Any:
    image, video = "<|image|>", "<|video|>"
    size = {"shortest_edge": 64, "longest_edge": 32 * 32 * 64}
    return transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(**QWEN, size=size),
        video_processor=transformers.Glm4vVideoProcessor(**QWEN, size=size),
        tokenizer=tokenizer(image, video),
        chat_template=template(
            f"<|begin_of_image|>{image}<|end_of_image|>", f"<|begin_of_video|>{video}<|end_of_video|>"
        ),
    )


def _internvl() -> Any:
    words = tokenizer(
        "<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}),
        video_processor=transformers.InternVLVideoProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer=words,
        image_seq_length=16,
        chat_template=template("<IMG_CONTEXT>", "<video>"),
    )
