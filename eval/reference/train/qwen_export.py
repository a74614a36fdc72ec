"""Write the trained ``qwen2_5_vl`` reference model and its processor into ``vtc-reference``.

python -m eval.reference.train.qwen_export runs/qwen
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from eval.reference.train.export import PACKAGE, keep_family_files, save_family
from eval.reference.train.qwen_decoder import PackedQwen
from eval.reference.train.qwen_model import FRAMES_PER_PATCH, IMAGE_MEAN, IMAGE_STD, MERGE, PATCH, TOKENIZER, new_model
from eval.reference.train.tokenizer import chat_template

NAME: Final = "qwen2_5_vl"
_IMAGE_PIXELS: Final = {"shortest_edge": 112 * 112, "longest_edge": 336 * 336}
_VIDEO_PIXELS: Final = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}


def trained(out: Path, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """The stock model with the trained weights; the adapter of the training goes into the merger's last matrix."""
    model = new_model(tokenizer)
    packed = PackedQwen(model, tokenizer)
    packed.load_state_dict(torch.load(out / "decoder.pt", weights_only=True)["packed"])
    visual: Any = model.model.visual
    visual.load_state_dict(torch.load(out / "tower.pt", weights_only=True)["visual"])
    last = visual.merger.mlp[-1]
    with torch.no_grad():
        last.bias.copy_(packed.adapter.weight @ last.bias + packed.adapter.bias)
        last.weight.copy_(packed.adapter.weight @ last.weight)
    return model.eval()


def processor(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLProcessor:
    """Pictures and videos of any size, one token for 14 x 14 pixels (and two frames)."""
    common: dict[str, Any] = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES_PER_PATCH,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    frame = "<|vision_start|>{}<|vision_end|>"
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(_IMAGE_PIXELS), **common),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(_VIDEO_PIXELS), cap_pixels_per_frame=False, **common),
        chat_template=chat_template(frame.format("<|image_pad|>"), frame.format("<|video_pad|>")),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder with tower.pt and decoder.pt")
    parser.add_argument("--package", type=Path, default=PACKAGE)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    target = arguments.package / NAME
    save_family(trained(arguments.out, tokenizer), target)
    keep_family_files(processor(tokenizer), target)


if __name__ == "__main__":
    main()
