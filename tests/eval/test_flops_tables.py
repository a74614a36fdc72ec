"""The FLOPs columns of published tables come out of the matrices that `vtc.report.flops` finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from vtc.core.stage import ModelShape
from vtc.report.flops import FLOPS_PER_MAC, DecoderShape
from vtc.selectors import AimSelector
from vtc.selectors.aim import retained

GOLDEN = Path(__file__).parents[1] / "golden" / "aim_flops_llmviewer.npz"

QWEN2_7B = transformers.Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
VICUNA_7B = transformers.LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
CONFIGS = {"Qwen/Qwen2-7B": QWEN2_7B, "lmsys/vicuna-7b-v1.5": VICUNA_7B}

VIDEO_TEXT, IMAGE_TEXT = 100, 40
"""Text tokens that AIM's tables assume."""


def llm_viewer_prefill_flops(config: Any, tokens_per_layer: list[int]) -> int:
    """FLOPs of a prefill in the convention of LLM-Viewer, which AIM (2412.03248) used.

    It also counts what is linear in the tokens: five operations per entry of the softmax, seven per value of each norm,
    one per value of each addition and two of the activation; and one, not two, per weight of the head. Its description
    of Qwen2 leaves out one of the two residual additions.
    """
    shape = DecoderShape.from_config(config)
    additions = 1 if config.model_type == "qwen2" else 2
    linear = (14 + additions + 2) * config.hidden_size
    layers = (
        FLOPS_PER_MAC * layer.macs(n) + 5 * config.num_attention_heads * n * n + linear * n
        for layer, n in zip(shape.layers, tokens_per_layer, strict=True)
    )
    return sum(layers) + shape.head_macs


def rows() -> list[Any]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        columns = zip(file["label"], file["model"], file["tokens_per_layer"], file["prefill_flops"], strict=True)
        return [
            pytest.param(str(model), [int(n) for n in tokens if n >= 0], float(flops), id=str(label))
            for label, model, tokens, flops in columns
        ]


@pytest.mark.parametrize(("model", "tokens", "flops"), rows())
def test_every_row_of_the_tool(model: str, tokens: list[int], flops: float) -> None:
    assert llm_viewer_prefill_flops(CONFIGS[model], tokens) == flops


def aim_tokens(depth: int, entered: int, text: int, *, prune: bool = True) -> list[int]:
    """Tokens per layer of AIM's own counting, which prunes on entering layer l1 already, one layer early."""
    selector = AimSelector().resolve(ModelShape(depth), 0.25)
    rates = [selector.rate(layer) if prune else 1.0 for layer in range(depth)]
    return [text + retained(entered, rate) for rate in rates]


# Table: LLaVA-OneVision-7B on video and LLaVA-1.5-7B on images, TFLOPs as printed.
PUBLISHED = [
    ("32 frames, all tokens", QWEN2_7B, aim_tokens(28, 32 * 196, VIDEO_TEXT, prune=False), 99.63),
    ("half merged", QWEN2_7B, aim_tokens(28, 32 * 98, VIDEO_TEXT, prune=False), 46.48),
    ("merged to a quarter", QWEN2_7B, aim_tokens(28, 32 * 49, VIDEO_TEXT, prune=False), 22.90),
    ("merged and pruned", QWEN2_7B, aim_tokens(28, 32 * 49, VIDEO_TEXT), 14.76),
    ("192 frames, merged and pruned", QWEN2_7B, aim_tokens(28, 192 * 49, VIDEO_TEXT), 99.27),
    ("image, all tokens", VICUNA_7B, aim_tokens(32, 576, IMAGE_TEXT, prune=False), 8.18),
    ("image, 252 tokens", VICUNA_7B, aim_tokens(32, 252, IMAGE_TEXT), 2.22),
    ("image, 72 tokens", VICUNA_7B, aim_tokens(32, 72, IMAGE_TEXT), 1.00),
]


@pytest.mark.parametrize(
    ("config", "tokens", "teraflops"), [row[1:] for row in PUBLISHED], ids=[r[0] for r in PUBLISHED]
)
def test_aim_table(config: Any, tokens: list[int], teraflops: float) -> None:
    computed = llm_viewer_prefill_flops(config, tokens) / 1e12
    # Within 0.1 % of what was printed, or of its last printed digit where that is coarser.
    assert abs(computed - teraflops) <= max(1e-3 * teraflops, 0.005)
