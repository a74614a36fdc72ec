"""All knowledge of transformers: one file per group of families, and the engine that they share."""

from vtc.adapters import gemma, internvl, llava, llava_next, qwen_vl, video_llava

__all__ = ["gemma", "internvl", "llava", "llava_next", "qwen_vl", "video_llava"]
