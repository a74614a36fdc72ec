"""The architectures that are covered, by their names in vLLM; the classes are imported when vLLM asks for one."""

from __future__ import annotations

import difflib

from vtc.errors import UnsupportedModelError

__all__ = ["FAMILIES", "check_architecture"]

_HERE = "vtc.integrations.vllm"

FAMILIES: dict[str, str] = {
    "LlavaForConditionalGeneration": f"{_HERE}.models:VtcLlava",
    "LlavaNextForConditionalGeneration": f"{_HERE}.models:VtcLlavaNext",
    "LlavaOnevisionForConditionalGeneration": f"{_HERE}.models:VtcLlavaOnevision",
    "InternVLForConditionalGeneration": f"{_HERE}.models:VtcInternVL",
    "Qwen2VLForConditionalGeneration": f"{_HERE}.qwen:VtcQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": f"{_HERE}.qwen:VtcQwen2_5VL",
    "Qwen3VLForConditionalGeneration": f"{_HERE}.qwen:VtcQwen3VL",
}
"""Architecture, and where its class is."""


def check_architecture(name: str) -> None:
    """Raise UnsupportedModelError unless an architecture is covered."""
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f" (the closest is {close[0]})" if close else ""
        raise UnsupportedModelError(
            f"vtc does not compress {name} inside vLLM{hint}; it does for {', '.join(FAMILIES)}. Leave the settings "
            "of vtc out to serve it with all its tokens."
        )
