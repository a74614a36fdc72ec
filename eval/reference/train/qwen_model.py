"""Shape of the ``qwen2_5_vl`` reference model, and a batched forward of its vision tower for training.

The tower has patches of 14 pixels and merges none, so that one language-model token is one cell of 14 pixels: a 224 x
224 picture gives 16 x 16 tokens, exactly the patches of the ``llava`` reference model's tower, from which it is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

TOKENIZER: Final = Path(__file__).parents[1] / "src" / "vtc_reference" / "tokenizer"
"""Folder of the tokenizer that all reference models share."""

PATCH: Final = 14
"""Side of a tower patch in pixels."""

MERGE: Final = 1
"""Patches per side of one language-model token."""

CELL: Final = PATCH * MERGE
"""Side of a language-model token in pixels."""

FRAMES_PER_PATCH: Final = 2
"""Frames that one tower patch spans (a still image is shown twice)."""

WINDOW: Final = 112
"""Side of an attention window in pixels: 8 x 8 patches."""

WIDTH: Final = 256
"""Width of the language model."""

IMAGE_MEAN: Final = (0.485, 0.456, 0.406)
IMAGE_STD: Final = (0.229, 0.224, 0.225)

VISION: Final[dict[str, Any]] = {
    "depth": 6,
    "hidden_size": 384,
    "intermediate_size": 768,
    "num_heads": 6,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES_PER_PATCH,
    "window_size": WINDOW,
    "fullatt_block_indexes": [1, 3, 5],
    "out_hidden_size": WIDTH,
    "tokens_per_second": 2,  # clips have 4 frames a second, hence 0.5 s per token: temporal positions step by 1
    "rope_parameters": {"rope_type": "axial", "rope_theta": 1.0e4},
}

TEXT: Final[dict[str, Any]] = {
    "hidden_size": WIDTH,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "use_sliding_window": False,
    # Text positions turn as in ``llava``, whose decoder is taken over. Time gets the frequencies from 1 to 0.42, rows
    # those from 0.32 to 0.13, columns 0.1 and less: the slowest that tells them apart takes half a turn or less over 8
    # steps, 16 rows, 16 columns. What lies below 0.01 hardly turns at all: there heads compare contents.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 24]},
}


def config(vocab_size: int, special: dict[str, int]) -> Qwen2_5_VLConfig:
    """Configuration of the reference model.

    Parameters
    ----------
    vocab_size : int
        Rows of the embedding table.
    special : dict
        Ids of ``image``, ``video``, ``vision_start``, ``vision_end``, ``pad``, ``bos`` and ``eos``.
    """
    return Qwen2_5_VLConfig(
        vision_config=dict(VISION),
        text_config={
            **TEXT,
            "vocab_size": vocab_size,
            "pad_token_id": special["pad"],
            "eos_token_id": special["eos"],
            "bos_token_id": special["bos"],
            "tie_word_embeddings": False,
        },
        image_token_id=special["image"],
        video_token_id=special["video"],
        vision_start_token_id=special["vision_start"],
        vision_end_token_id=special["vision_end"],
        tie_word_embeddings=False,
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the tokens with a meaning of their own, under the names that :func:`config` wants."""
    tokens = {
        "pad": "<pad>", "bos": "<s>", "eos": "</s>", "image": "<|image_pad|>", "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
    }  # fmt: skip
    return {name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in tokens.items()}


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model of the right shape for the shared tokenizer."""
    vocabulary = -(-len(tokenizer) // 64) * 64
    return Qwen2_5_VLForConditionalGeneration(config(vocabulary, special_ids(tokenizer)))


def patchify(frames: Tensor) -> Tensor:
    """Cut frames into tower patches, normalised, in the order of ``Qwen2VLImageProcessor``.

    Parameters
    ----------
    frames : Tensor (B, T, H, W, 3) uint8
        ``T`` even, sides multiples of 14.

    Returns
    -------
    Tensor (B, T / 2 * H / 14 * W / 14, 1176) float32
    """
    batch, time, height, width, _ = frames.shape
    x = (frames.float() / 255.0 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    x = x.view(
        batch, time // FRAMES_PER_PATCH, FRAMES_PER_PATCH, height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH, 3
    )
    return x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(batch, -1, 3 * FRAMES_PER_PATCH * PATCH * PATCH)


class BatchedTower:
    """Forward of the stock tower for equal-sized inputs, without its loop over windows.

    The stock module calls attention once per window when flash attention is not there, which costs more than the
    arithmetic. Here windows are a batch dimension. Same weights, same result (a test compares them). Inputs whose sides
    are not multiples of :data:`WINDOW` go through the stock module.

    Parameters
    ----------
    visual : nn.Module
        The tower of a ``Qwen2_5_VLForConditionalGeneration``.
    compiled : bool
        Run the arithmetic through ``torch.compile`` (about 30 % less time after a minute of compilation).
    """

    def __init__(self, visual: nn.Module, compiled: bool = False) -> None:
        self.visual = visual
        self._run = torch.compile(self._forward, dynamic=False) if compiled else self._forward
        self._layouts: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def __call__(self, frames: Tensor) -> Tensor:
        """Tokens ``(B, T / 2 * H / 14 * W / 14, WIDTH)`` of ``frames (B, T, H, W, 3)`` uint8."""
        batch, time, height, width, _ = frames.shape
        patches = patchify(frames)
        groups = batch * time // FRAMES_PER_PATCH  # frame groups never see each other in this tower
        if height % WINDOW or width % WINDOW:
            grid = torch.tensor([[1, height // PATCH, width // PATCH]] * groups)
            tokens: Tensor = self.visual(patches.flatten(0, 1), grid_thw=grid).pooler_output
            return tokens.view(batch, -1, tokens.shape[-1])
        order, back, cos, sin = self.layout(height, width)
        tokens = self._run(patches.view(groups, -1, patches.shape[-1])[:, order], cos, sin)
        return tokens[:, back].reshape(batch, -1, tokens.shape[-1])

    def layout(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Order of the patches in windows, order that undoes it for tokens, and the rotary tables in window order."""
        if (height, width) not in self._layouts:
            grid = torch.tensor([[1, height // PATCH, width // PATCH]])
            windows, _ = get_vision_window_index(grid, spatial_merge_size=MERGE, window_size=WINDOW, patch_size=PATCH)
            unit = MERGE * MERGE
            order = (windows[:, None] * unit + torch.arange(unit)).flatten()
            visual: Any = self.visual
            cos, sin = visual.rotary_pos_emb(torch.empty(0), get_vision_position_ids(grid, MERGE))
            cos, sin = (t[order][None, :, None] for t in (cos, sin))
            self._layouts[height, width] = order, torch.argsort(windows), cos, sin
        return self._layouts[height, width]

    def _forward(self, patches: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        visual: Any = self.visual
        x = functional.linear(patches, visual.patch_embed.proj.weight.flatten(1))
        for index, block in enumerate(visual.blocks):
            x = _block(block, x, cos.to(x.dtype), sin.to(x.dtype), full=index in visual.fullatt_block_indexes)
        x = _rms(x, visual.merger.ln_q)
        merged: Tensor = visual.merger.mlp(x.reshape(x.shape[0], -1, visual.merger.hidden_size))
        return merged


def _rms(x: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _block(block: Any, x: Tensor, cos: Tensor, sin: Tensor, full: bool) -> Tensor:
    groups, length, width = x.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(_rms(x, block.norm1)).view(groups, length, 3, heads, width // heads)
    query, key, value = qkv.unbind(2)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    if not full:
        window = (WINDOW // PATCH) ** 2
        query, key, value = (t.reshape(-1, window, heads, width // heads) for t in (query, key, value))
    attended = functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    x = x + block.attn.proj(attended.transpose(1, 2).reshape(groups, length, width))
    h = _rms(x, block.norm2)
    fed: Tensor = block.mlp.down_proj(functional.silu(block.mlp.gate_proj(h)) * block.mlp.up_proj(h))
    return x + fed
