"""A run of training, and where it stands: what is written so that an interrupted run goes on to the same result."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.files import replacing, write_text
from vtc.plain import parse_json

__all__ = ["STATE", "WEIGHTS", "TrainingRun", "TrainingState"]

STATE, WEIGHTS = "training.json", "training.safetensors"
"""Files of an unfinished run."""

_FLOOR = 0.05  # of the learning rate, at the end
_WARM = 0.03  # fraction of the steps in which it rises
_GATES = 10.0  # how much faster single numbers, which are gates, learn than matrices


@dataclass(frozen=True)
class TrainingRun:
    """What decides the result of a training run, besides the samples and the model."""

    steps: int
    batch: int
    rate: float
    seed: int
    lora: int | None = None

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: a short rise, then half a cosine."""
        warm = max(1, round(self.steps * _WARM))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * done)) / 2)

    def samples_of(self, step: int, count: int) -> list[int]:
        """Samples of a step: every epoch shows each once, in an order of its own."""
        order = itertools.chain.from_iterable(
            random.Random(f"{self.seed} {epoch}").sample(range(count), count)
            for epoch in range(step * self.batch // count, ((step + 1) * self.batch - 1) // count + 1)
        )
        first = step * self.batch % count
        return list(itertools.islice(order, first, first + self.batch))


@dataclass
class TrainingState:
    """Where a run stands: weights, and the two moments of AdamW, by the name of the weight."""

    mark: str
    step: int
    seconds: float
    tensors: dict[str, Tensor]

    @classmethod
    def start(cls, module: nn.Module, mark: str) -> TrainingState:
        """Return the state before the first step."""
        named = {name: value.detach().clone().cpu() for name, value in module.named_parameters()}
        tensors = {f"weight.{name}": value for name, value in named.items()}
        for moment in ("mean", "square"):
            tensors |= {f"{moment}.{name}": torch.zeros_like(value) for name, value in named.items()}
        return cls(mark, 0, 0.0, tensors)

    @classmethod
    def read(cls, folder: Path, mark: str) -> TrainingState | None:
        """Read the state that an interrupted run left in a folder; None if there is none."""
        if not (folder / STATE).exists():
            return None
        try:
            data = parse_json((folder / STATE).read_text(encoding="utf-8"))
            found = cls(data["mark"], data["step"], data["seconds"], safetensors.torch.load_file(folder / WEIGHTS))
            step = int(found.tensors.pop("step")[0])
        except (OSError, ConfigError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{folder}: the state of the interrupted run cannot be read: {error}") from error
        if found.mark != mark:
            raise ConfigError(
                f"{folder} holds the state of a run with other samples, another model or other settings; name another "
                "folder, or give those of that run to go on."
            )
        if step != found.step:
            raise ConfigError(f"{folder}: {STATE} and {WEIGHTS} are of different steps; remove both to start anew.")
        return found

    def write(self, folder: Path) -> None:
        """Write the state; two files that do not belong together are found by the step in both."""
        with replacing(folder / WEIGHTS) as file:
            safetensors.torch.save_file({**self.tensors, "step": torch.tensor([self.step])}, file)
        data = {"mark": self.mark, "step": self.step, "seconds": self.seconds}
        write_text(folder / STATE, json.dumps(data) + "\n")

    def put_into(self, module: nn.Module) -> None:
        """Give the module these weights."""
        with torch.no_grad():
            for name, value in module.named_parameters():
                value.copy_(self.tensors[f"weight.{name}"])

    def optimizer(self, module: nn.Module) -> torch.optim.AdamW:
        """Return an optimiser with these moments."""
        gates = [weight for weight in module.parameters() if not weight.ndim]
        matrices = [weight for weight in module.parameters() if weight.ndim]
        groups = [{"params": matrices, "faster": 1.0}, {"params": gates, "faster": _GATES}]
        optimizer = torch.optim.AdamW(groups[: 1 + bool(gates)], weight_decay=0.0)
        for name, value in module.named_parameters():
            if self.step:
                optimizer.state[value] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": self.tensors[f"mean.{name}"].clone().to(value.device),
                    "exp_avg_sq": self.tensors[f"square.{name}"].clone().to(value.device),
                }
        return optimizer

    def take(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy what the module and the optimiser hold."""
        for name, value in module.named_parameters():
            self.tensors[f"weight.{name}"] = value.detach().cpu().clone()
            held = optimizer.state[value]
            self.tensors[f"mean.{name}"] = held["exp_avg"].cpu().clone()
            self.tensors[f"square.{name}"] = held["exp_avg_sq"].cpu().clone()
