"""Folders of trained modules: ``modules.safetensors`` and ``modules.json``.

The JSON says for which method and model the modules were made, and how they are built; weights run in float32, whatever
they are stored in. Nothing in the folder is executed when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from ..._version import package_version
from ...core.stage import ModelShape
from ...errors import ConfigError
from ...files import replacing, write_text
from ...plain import parse_json, plain, shown

__all__ = [
    "FORMAT",
    "Modules",
    "begin_module",
    "embedding_width",
    "initialised",
    "load_module",
    "read_modules",
    "save_modules",
]

FORMAT = "vtc-modules-1"

M = TypeVar("M", bound=nn.Module)

_JSON, _WEIGHTS = "modules.json", "modules.safetensors"


@dataclass(frozen=True)
class Modules:
    """What ``modules.json`` says.

    Attributes
    ----------
    method
        Id of the method.
    family
        `config.model_type` of the model that they were trained with.
    width
        Of that model's embeddings.
    vision_width
        Of the hidden states of its tower.
    decoder_layers
        Of its language model.
    settings
        Arguments that the module is built with.
    training
        How they were trained, for the reader: steps, seed, samples, seconds.
    """

    method: str
    family: str
    width: int
    vision_width: int | None
    decoder_layers: int
    settings: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, method: str, shape: ModelShape, settings: Mapping[str, Any]) -> Modules:
        """Describe modules of a method for a model.

        Raises
        ------
        ConfigError
            The model's family or width is not known.
        """
        if shape.family is None or shape.width is None:
            raise ConfigError(f"{method}: modules are made for one model, but its family and width are not known.")
        own = (shape.family, shape.width, shape.vision_width, shape.decoder_layers)
        return cls(method, *own, settings=dict(settings))

    def check_fit(self, shape: ModelShape, folder: str) -> None:
        """Raise ConfigError where these modules were made for a model of another family or other sizes."""
        for name, what in (
            ("family", "the family"),
            ("width", "embeddings of the width"),
            ("vision_width", "a tower of the width"),
            ("decoder_layers", "so many decoder layers:"),
        ):
            made, found = getattr(self, name), getattr(shape, name)
            if found is not None and made != found:
                raise ConfigError(
                    f"{self.method}: the modules in {folder} were trained for {what} {made}, but this model has "
                    f"{found}; train some for it with vtc train {self.method}."
                )


def save_modules(folder: str | Path, modules: Modules, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Write trained modules to a folder, which is made if there is none.

    Parameters
    ----------
    folder, modules, module
    dtype
        In which the weights are written; float16 halves the file, and is not what was trained bit for bit.

    Raises
    ------
    InputError, OSError
        The files cannot be written.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in module.state_dict().items()}
    with replacing(where / _WEIGHTS) as file:
        safetensors.torch.save_file(weights, file)
    data = {"format": FORMAT, "version": package_version(), **plain(asdict(modules), "modules")}
    write_text(where / _JSON, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_modules(folder: str | Path, method: str) -> tuple[Modules, dict[str, Tensor]]:
    """Read what `save_modules` wrote: the description, and the weights by name.

    Raises
    ------
    ConfigError
        There is no such folder, it holds something else, or modules of another method.
    """
    where = Path(folder)
    try:
        data = parse_json((where / _JSON).read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(where / _WEIGHTS)
    except OSError as error:
        raise ConfigError(
            f"{method}: {where} holds no trained modules: {error.filename or where}: {error.strerror or error}. Make "
            f"them with vtc train {method}, or name a folder that has {_JSON} and {_WEIGHTS}."
        ) from error
    except (ConfigError, UnicodeDecodeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{method}: {where} cannot be read as trained modules: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else data
        raise ConfigError(f"{method}: {where} has the format {shown(found)}, expected {FORMAT!r}.")
    if data.get("method") != method:
        raise ConfigError(f"{method}: {where} holds modules of the method {shown(data.get('method'))}.")
    try:
        modules = Modules(**{name: value for name, value in data.items() if name not in ("format", "version")})
    except TypeError as error:
        raise ConfigError(f"{method}: {where / _JSON} is no description of modules: {error}") from error
    return modules, weights


def embedding_width(method: str, shape: ModelShape) -> int:
    """Return the width of a model's embeddings.

    Raises
    ------
    ConfigError
        It is not known.
    """
    if shape.width is None:
        raise ConfigError(f"{method}: modules are made for one model, but the width of its embeddings is not known.")
    return shape.width


def begin_module(
    method: str, shape: ModelShape, build: Callable[..., M], settings: Mapping[str, Any], seed: int
) -> tuple[Modules, M]:
    """Describe modules of a method for a model, and make them of `settings`, with random weights of `seed`.

    Raises
    ------
    ConfigError
        The model's family or width is not known, or `build` refuses the settings.
    """
    modules = Modules.of(method, shape, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return modules, build(**settings)


def load_module(folder: str | Path, method: str, build: Callable[..., M]) -> tuple[Modules, M]:
    """Read the modules of a folder, for one method: no two share a module.

    Parameters
    ----------
    folder, method
    build
        Makes the module, of the settings in the folder.

    Raises
    ------
    ConfigError
        It holds none of this method, or describes them wrongly.
    """
    modules, weights = read_modules(folder, method)
    try:
        module = build(**modules.settings)
    except TypeError as error:
        raise ConfigError(f"{method}: {folder} describes its modules wrongly: {error}") from error
    return modules, initialised(module, weights, method, folder)


def initialised(module: M, weights: Mapping[str, Tensor], method: str, folder: str | Path) -> M:
    """Give a module the weights of a folder, in float32, ready to run and frozen.

    Raises
    ------
    ConfigError
        Names or shapes differ, or a weight is not finite.
    """
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ConfigError(f"{method}: the weights in {folder} are not those of its modules: {error}") from error
    bad = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise ConfigError(f"{method}: weights in {folder} are NaN or infinite: {', '.join(bad)}.")
    return module.float().eval().requires_grad_(False)
