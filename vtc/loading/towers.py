"""The vision tower that an original LLaVA checkpoint names: configuration, weights and how it takes pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.errors import InputError, UnsupportedModelError
from vtc.loading.weights import Weights, read_json

__all__ = ["Tower", "find_tower"]

_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_KNOWN = {
    "openai/clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_LARGE, "image_size": 336},
}
"""The towers of the published checkpoints, for those that hold the weights of theirs."""

_OTHER_HALF = ("text_model.", "logit_scale", "text_projection.", "visual_projection.")


@dataclass(frozen=True)
class Tower:
    """A CLIP vision tower: its configuration, and its folder if there is one."""

    config: Any
    folder: Path | None

    @property
    def tokens(self) -> int:
        """Number of patches of one picture."""
        return int((self.config.image_size // self.config.patch_size) ** 2)

    def weights(self) -> dict[str, Any]:
        """Return its weights by their names within a tower of transformers, still on the disk."""
        if self.folder is None:
            raise InputError("a tower without a folder has no weights")
        named = {}
        for name, stored in Weights.of(self.folder).named.items():
            if not name.startswith(_OTHER_HALF) and not name.endswith("position_ids"):
                named[name.removeprefix("vision_model.")] = stored
        return named

    def image_settings(self) -> dict[str, Any]:
        """Return how pictures are resized, cropped and normalised, as the image processors of transformers take it."""
        stored = {}
        if self.folder is not None and (self.folder / "preprocessor_config.json").is_file():
            stored = read_json(self.folder / "preprocessor_config.json")
        side = self.config.image_size
        size, crop = stored.get("size", side), stored.get("crop_size", side)
        settings: dict[str, Any] = {
            name: stored[name] for name in ("image_mean", "image_std", "resample") if name in stored
        }
        return {
            **settings,
            "size": {"shortest_edge": size} if isinstance(size, int) else size,
            "crop_size": {"height": crop, "width": crop} if isinstance(crop, int) else crop,
        }


def find_tower(folder: Path, name: str, given: Path | None, *, weights_inside: bool) -> Tower:
    """Find the tower that a checkpoint names: where it was given, where the name points, beside it, or in the cache.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    name : str
        Its `mm_vision_tower`: a name such as "openai/clip-vit-large-patch14-336", or a path.
    given : Path, optional
        The folder of the tower.
    weights_inside : bool
        Whether the checkpoint holds the weights of its tower. A known name is then enough.

    Raises
    ------
    UnsupportedModelError
        It is no CLIP.
    InputError
        It is not there.
    """
    found = given if given is not None else _search(folder, name)
    if found is not None:
        return Tower(_config(found), found)
    if weights_inside and name in _KNOWN:
        from transformers import CLIPVisionConfig

        return Tower(CLIPVisionConfig(**_KNOWN[name]), None)
    what = "the configuration" if weights_inside else "the weights"
    raise InputError(
        f"{folder}: {what} of its vision tower {name} is needed and neither in it, nor in a folder {Path(name).name} "
        "beside it, nor in the cache of huggingface_hub; put the tower's own checkpoint there, or give its folder as "
        "vision_tower="
    )


def _search(folder: Path, name: str) -> Path | None:
    last = Path(name).name
    for place in (Path(name), folder / name, folder / last, folder.parent / last):
        if (place / "config.json").is_file():
            return place
    if name.count("/") == 1 and not os.path.isabs(name):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _config(folder: Path) -> Any:
    from transformers import CLIPVisionConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds no config.json; vision_tower is the folder of a CLIP checkpoint")
    stored = read_json(folder / "config.json")
    kind = stored.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise UnsupportedModelError(f"{folder}: its model_type is {kind}; the original LLaVA has towers of CLIP alone")
    inner = stored.get("vision_config", {}) if kind == "clip" else stored
    leave = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
    known = CLIPVisionConfig().to_dict().keys() - leave  # older files hold settings of text generation, too
    return CLIPVisionConfig(**{key: value for key, value in inner.items() if key in known})
