"""Facts about families of models, one file per family or group of families that share code."""

from vtc.adapters import (
    cohere,
    gemma,
    glm4v,
    internvl,
    llava,
    llava_next,
    pixtral,
    qwen_vl,
    video_llava,
)

__all__ = [
    "cohere",
    "gemma",
    "glm4v",
    "internvl",
    "llava",
    "llava_next",
    "pixtral",
    "qwen_vl",
    "video_llava",
]
