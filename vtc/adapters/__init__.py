"""Facts about families of models, one file per family or group of families that share code."""

from vtc.adapters import (
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
    "gemma",
    "glm4v",
    "internvl",
    "llava",
    "llava_next",
    "pixtral",
    "qwen_vl",
    "video_llava",
]
