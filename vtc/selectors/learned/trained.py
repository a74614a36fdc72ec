"""What all methods with trained modules share: the option that names their folder, and the check that they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ...core.selector import Selector
from ...core.stage import ModelShape
from ...errors import ConfigError
from .folder import Modules, load_module
from .lora import LoraAdapter, read_lora

__all__ = ["TrainedSelector"]


@dataclass(frozen=True)
class TrainedSelector(Selector):
    """A method that runs modules of its own, read from the folder that its option `modules` names.

    `module_class` is called with the settings in ``modules.json``. The modules run in float32, beside any model.
    """

    trained: ClassVar[bool] = True
    module_class: ClassVar[type[nn.Module]]

    modules: str | None = None
    module: Any = field(default=None, init=False, repr=False, compare=False)
    made_for: Modules | None = field(default=None, init=False, repr=False, compare=False)
    lora: LoraAdapter | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.modules is None:
            return
        if not isinstance(self.modules, str):
            raise ConfigError(f"{self.name}: modules must be the path of a folder, got {self.modules!r}.")
        made_for, module = load_module(self.modules, self.name, self.module_class)
        object.__setattr__(self, "made_for", made_for)
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "lora", read_lora(self.modules, self.name))

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> TrainedSelector:
        """Check that there are modules, and that they fit the model."""
        if shape is not None and shape.family is not None:
            if self.made_for is None:
                raise self.without_modules()
            self.made_for.check_fit(shape, str(self.modules))
        return self

    def layer_changes(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Return what the adapter changes that was trained beside the modules, if there is one."""
        return {} if self.lora is None else self.lora.changes()

    def without_modules(self) -> ConfigError:
        """Return the error that says that there are none."""
        return ConfigError(
            f'{self.name}: give modules="folder": the modules are trained for one model, with vtc train {self.name}.'
        )
