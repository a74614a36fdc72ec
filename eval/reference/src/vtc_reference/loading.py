"""Assemble a model from its configuration, the shared tower and its own weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from vtc_reference.catalogue import CATALOGUE, Entry

_HERE = Path(__file__).parent
_IMAGE_SUFFIXES = {".png", ".jpg"}


def names() -> tuple[str, ...]:
    """Return the names of the models that :func:`load` knows and whose weights are installed."""
    return tuple(name for name, entry in CATALOGUE.items() if all(file.is_file() for file in _weight_files(entry)))


def _weight_files(entry: Entry) -> list[Path]:
    own = [] if entry.adapter is None else [_HERE / entry.adapter / "adapter_model.safetensors"]
    return [_HERE / entry.folder / "model.safetensors", *own]


def _entry(name: str) -> Entry:
    if name not in names():
        raise KeyError(f"no reference model is called {name!r}; there are: {', '.join(names()) or 'none'}")
    return CATALOGUE[name]


def tower_weights(entry: Entry) -> dict[str, torch.Tensor]:
    """Return the shared tower's weights under the names of the entry's family; empty if it has its own tower."""
    if entry.tower_prefix is None:
        return {}
    weights = {}
    for key, tensor in load_file(_HERE / "tower" / "model.safetensors").items():
        if key in entry.tower_without:
            continue
        for old, new in entry.tower_renames:
            key = key.replace(old, new)
        weights[entry.tower_prefix + key] = tensor
    return weights


@torch.no_grad()
def add_adapter(model: Any, folder: Path) -> None:
    """Add the low-rank changes ``alpha / r B A`` of an adapter in PEFT's format to a model's weights, in place.

    Raises
    ------
    AttributeError
        The adapter changes a layer that the model does not have.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    factors = load_file(folder / "adapter_model.safetensors")
    for key, factor in factors.items():
        for first, second in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if key.endswith(first):
                weight = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(f".{first}")).weight
                change = scale * (factors[key.removesuffix(first) + second].float() @ factor.float())
                # The factors of an embedding are those of its transpose.
                weight.copy_(weight.float() + (change.t() if "embedding" in first else change))


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a reference model as the stock transformers class, in eval mode, and its processor.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    dtype : torch.dtype
        Weights are stored in float16 and converted to this.

    Returns
    -------
    (model, processor)

    Raises
    ------
    KeyError
        If there is no such model.
    RuntimeError
        If this release of transformers names the architecture's weights differently.
    """
    entry = _entry(name)
    folder = _HERE / entry.folder
    weights = tower_weights(entry) | load_file(folder / "model.safetensors")
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state alone
        model, found = getattr(transformers, entry.architecture).from_pretrained(
            None,
            config=transformers.AutoConfig.from_pretrained(folder),
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
        )
    wrong = {kind: sorted(keys) for kind, keys in found.items() if keys}
    if wrong:
        raise RuntimeError(f"the weights of {name!r} do not fit transformers {transformers.__version__}: {wrong}")
    if entry.adapter is not None:
        add_adapter(model, _HERE / entry.adapter)
    model.eval()
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, _processor(folder)


def _processor(folder: Path) -> Any:
    """Build the family's processor from the shared tokenizer's files and the family's own, which take precedence."""
    with tempfile.TemporaryDirectory() as place:
        for source in (_HERE / "tokenizer", folder):
            for file in source.iterdir():
                if file.suffix in (".json", ".jinja"):
                    shutil.copy(file, place)
        return transformers.AutoProcessor.from_pretrained(place)


def export(name: str, folder: str | Path) -> Path:
    """Write the model and its processor as an ordinary checkpoint, for tools that need a path.

    Returns
    -------
    Path
        The folder; ``from_pretrained`` reads it.
    """
    target = Path(folder)
    model, processor = load(name)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    (target / "README.md").write_text(card(name), encoding="utf-8")
    return target


def export_open_clip(folder: str | Path) -> Path:
    """Write the contrastive model whose image tower is that of ``llava``, in the format of open_clip.

    Its text tower, the LayerNorm and the projection behind the image tower are stored here; the image tower is the
    shared one, without its last layer, which ``llava`` does not read.

    Returns
    -------
    Path
        The folder; ``open_clip.create_model_from_pretrained(f"local-dir:{folder}")`` reads it.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    weights = open_clip_tower() | load_file(_HERE / "openclip" / "open_clip_model.safetensors")
    save_file(weights, target / "open_clip_model.safetensors", metadata={"format": "pt"})
    shutil.copy(_HERE / "openclip" / "open_clip_config.json", target)
    for file in (_HERE / "tokenizer").iterdir():
        shutil.copy(file, target)
    return target


def open_clip_tower(layers: int = 11) -> dict[str, torch.Tensor]:
    """Return the shared tower's first layers under the names of open_clip's, whose patches are embedded without a bias.

    It is added to the position of every patch.
    """
    tower = load_file(_HERE / "tower" / "model.safetensors")
    positions = tower["embeddings.position_embeddings"][0].clone()
    positions[1:] += tower["embeddings.patch_embeddings.projection.bias"]
    weights = {
        "visual.class_embedding": tower["embeddings.cls_token"].flatten(),
        "visual.positional_embedding": positions,
        "visual.conv1.weight": tower["embeddings.patch_embeddings.projection.weight"],
    }
    names = {
        "norm1.{}": "ln_1.{}",
        "norm2.{}": "ln_2.{}",
        "attention.output.dense.{}": "attn.out_proj.{}",
        "mlp.fc1.{}": "mlp.c_fc.{}",
        "mlp.fc2.{}": "mlp.c_proj.{}",
    }
    for layer in range(layers):
        source, target = f"encoder.layer.{layer}.", f"visual.transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                weights[target + ours.format(kind)] = tower[source + theirs.format(kind)]
            parts = [tower[f"{source}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            weights[f"{target}attn.in_proj_{kind}"] = torch.cat(parts)
        for number in (1, 2):
            weights[f"{target}ls_{number}.gamma"] = tower[f"{source}layer_scale{number}.lambda1"]
    return weights


def card(name: str) -> str:
    """Return the model card as Markdown."""
    return (_HERE / _entry(name).own / "README.md").read_text(encoding="utf-8")


def samples() -> list[Path]:
    """Return the paths of the sample images, sorted; ``questions.jsonl`` beside them holds questions and answers."""
    return sorted(path for path in (_HERE / "samples").iterdir() if path.suffix in _IMAGE_SUFFIXES)


def modules(name: str) -> dict[str, Path]:
    """Return the folders of trained modules that ship with a model, by their names, such as "llava-mini-4"."""
    return {path.name: path for path in sorted((_HERE / CATALOGUE[name].own / "modules").glob("*"))}


def clips() -> list[Path]:
    """Return the paths of the sample clips, sorted; ``questions.jsonl`` beside them holds questions and answers."""
    return sorted((_HERE / "clips").glob("*.mp4"))
