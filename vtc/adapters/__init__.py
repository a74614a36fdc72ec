"""Facts about families of models, one file per family or group of families that share code."""

from vtc.adapters import gemma, internvl, llava, llava_next, qwen_vl, video_llava

__all__ = ["gemma", "internvl", "llava", "llava_next", "qwen_vl", "video_llava"]
