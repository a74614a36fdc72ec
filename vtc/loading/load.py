"""`vtc.load`: from the name of a model to the model and its processor."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vtc import reference
from vtc.errors import ConfigError, InputError, VtcError
from vtc.loading.original_llava import is_original_llava, load_original_llava
from vtc.loading.weights import first_line, read_json

__all__ = ["load"]


def load(
    source: str | Path,
    *,
    vision_tower: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its processor, from this machine's disk alone.

    Beside checkpoints of transformers it takes those of the original LLaVA code (`llava-v1.5-*`, `llava-v1.6-*`), which
    become `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration` by other names for their weights and
    their settings. None of that code runs, and weights are read one by one, so that a model is in memory once.

    Parameters
    ----------
    source : str or Path
        The folder of a checkpoint; or "reference", "reference:NAME" for a small model of vtc-reference.
    vision_tower : str or Path, optional
        The folder of the CLIP checkpoint that an original LLaVA names, where it holds no weights of its tower. By
        default a folder of that name in or beside the checkpoint, or the cache of huggingface_hub.
    dtype : str or torch.dtype
        Of the weights; "auto" as stored.
    **options
        For `from_pretrained` of transformers: `device_map`, `quantization_config`, `attn_implementation`, ...;
        `torch_dtype` is the older name of `dtype`.

    Returns
    -------
    (model, processor)

    Raises
    ------
    InputError
        The folder is missing, incomplete or broken, or holds no image-text-to-text model.
    UnsupportedModelError
        It is an original LLaVA for which transformers has no classes; the message names the setting.
    ConfigError
        An argument does not fit the source, or there is no reference model of that name.
    StateError
        vtc-reference is not installed.
    """
    older = options.pop("torch_dtype", None)
    if older is not None and dtype != "auto":
        raise ConfigError(f"dtype={dtype!r} and torch_dtype={older!r} given, which are two names of one; leave one out")
    dtype = older or dtype
    if isinstance(dtype, str) and dtype != "auto":
        dtype = _dtype(dtype)
    kind, _, name = str(source).partition(":")
    folder = Path(source)
    if kind == "reference":
        if vision_tower is not None or options:
            raise ConfigError(f"{', '.join(options) or 'vision_tower'} given with {source}, which takes a dtype alone")
        return reference.load(name or "llava", None if isinstance(dtype, str) else dtype)
    if not folder.is_dir():
        what = "a file, and no folder" if folder.is_file() else "no such folder"
        raise InputError(f"{folder}: {what}; give that of a checkpoint, or the word reference[:NAME]")
    config: dict[str, Any] = {}
    with suppress(InputError):  # a missing or broken file is for transformers to name
        config = read_json(folder / "config.json")
    original = is_original_llava(config)
    if vision_tower is not None and not original:
        raise ConfigError(f"vision_tower given, but {folder} is no original LLaVA checkpoint and holds its own tower")
    try:
        if original:
            tower = None if vision_tower is None else Path(vision_tower)
            return load_original_llava(folder, config, tower, dtype, options)
        return _load_transformers(folder, dtype, options)
    except (VtcError, ImportError):
        raise
    except Exception as error:  # a broken checkpoint can raise anything: it is code, JSON and tensors of others
        raise InputError(f"{folder}: cannot be loaded as an image-text-to-text model: {first_line(error)}") from error


def _load_transformers(folder: Path, dtype: str | torch.dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype, **options)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype={name!r}: expected auto, float32, bfloat16, float16, or another dtype of torch")
    return found
