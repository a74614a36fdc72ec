"""All knowledge of transformers: one file per group of families, and the engine that they share."""

from vtc.adapters import internvl, llava, llava_next, qwen_vl, video_llava

__all__ = ["internvl", "llava", "llava_next", "qwen_vl", "video_llava"]
