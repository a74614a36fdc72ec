"""The weights of a folder, shard by shard, read from the disk when they are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError
from vtc.plain import parse_json

__all__ = ["Weights", "first_line", "read_json", "tensor"]

_NAMES = ("model.safetensors", "pytorch_model.bin")


@dataclass
class Weights:
    """Named tensors of a checkpoint that stay on the disk until one is read.

    Shards of safetensors give slices, of PyTorch's zip format tensors in a file that is mapped into memory, so that a
    model is never in memory twice. `tensor` reads either. Pickles are read with ``weights_only=True``: no code in them
    runs.
    """

    named: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """Open all shards of a folder; safetensors where there are both kinds.

        Raises
        ------
        InputError
            There are no weights, a shard is missing, or a file is broken.
        """
        weights = cls()
        for file in _shards(folder):
            try:
                weights._open(file)
            except Exception as error:  # a broken file can raise anything
                raise InputError(f"{file}: cannot be read as weights: {first_line(error)}") from error
        return weights

    def _open(self, file: Path) -> None:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            handle = safe_open(file, framework="pt")
            self.named.update({name: handle.get_slice(name) for name in handle.keys()})  # noqa: SIM118  # no mapping
            return
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            found = torch.load(file, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
        self.named.update({name: value for name, value in found.items() if isinstance(value, Tensor)})


def tensor(stored: Any) -> Tensor:
    """Read what `Weights` has under a name."""
    value: Tensor = stored[...]
    return value


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises
    ------
    InputError
        There is no such file, or it holds something else.
    """
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds no JSON object")
    return value


def first_line(error: BaseException) -> str:
    """Return the first line that says something of what was raised."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _shards(folder: Path) -> list[Path]:
    for name in _NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict) or not where:
                raise InputError(f"{index}: has no weight_map, which says where each weight is")
            files = [folder / str(shard) for shard in sorted(set(where.values()))]
            if lost := [file.name for file in files if not file.is_file()]:
                raise InputError(f"{folder}: {index.name} names {', '.join(lost)}, which the folder lacks")
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise InputError(f"{folder}: holds no weights: neither {' nor '.join(_NAMES)}, nor an index of shards")
