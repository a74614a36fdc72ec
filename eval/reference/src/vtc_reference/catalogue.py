"""The available models, and how each is assembled from the files beside this one.

To add a model: make a folder with ``config.json``, ``model.safetensors`` (everything but a shared tower), the
processor's JSON files, ``chat_template.jinja`` and ``README.md``; then add one entry to :data:`CATALOGUE`. A model that
is another one with a low-rank adapter has a folder with the adapter, in PEFT's format, and a ``README.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Entry:
    """Describe how one model is assembled.

    Attributes
    ----------
    folder : str
        Folder beside this file with the model's own files.
    architecture : str
        Name of the transformers class.
    tower_prefix : str or None
        Prefix of the shared tower's weights in a checkpoint of the family; None if the model has a tower of its own.
    tower_renames : tuple of (str, str)
        Substring replacements from the shared tower's weight names to the family's.
    tower_without : tuple of str
        Weights of the shared tower that the family does not have (they only serve to pretrain a tower).
    adapter : str or None
        Folder beside this file with a low-rank adapter, which is added to the weights of ``folder`` on loading.
    """

    folder: str
    architecture: str
    tower_prefix: str | None = None
    tower_renames: tuple[tuple[str, str], ...] = ()
    tower_without: tuple[str, ...] = ()
    adapter: str | None = None

    @property
    def own(self) -> str:
        """The folder of what is this model's alone: its card, its trained modules."""
        return self.adapter or self.folder


CATALOGUE: Final[dict[str, Entry]] = {
    "llava": Entry(folder="llava", architecture="LlavaForConditionalGeneration", tower_prefix="vision_tower."),
    "internvl": Entry(
        folder="internvl",
        architecture="InternVLForConditionalGeneration",
        tower_prefix="vision_tower.",
        tower_without=("embeddings.mask_token",),
        tower_renames=(
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".attention.attention.query.", ".attention.q_proj."),
            (".attention.attention.key.", ".attention.k_proj."),
            (".attention.attention.value.", ".attention.v_proj."),
            (".attention.output.dense.", ".attention.projection_layer."),
            (".layer_scale1.lambda1", ".lambda_1"),
            (".layer_scale2.lambda1", ".lambda_2"),
        ),
    ),
    "qwen2_5_vl": Entry(folder="qwen2_5_vl", architecture="Qwen2_5_VLForConditionalGeneration"),
    "qwen2_5_vl-long": Entry(
        folder="qwen2_5_vl", architecture="Qwen2_5_VLForConditionalGeneration", adapter="qwen2_5_vl-long"
    ),
}
