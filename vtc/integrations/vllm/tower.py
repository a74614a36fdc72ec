"""What methods read of vLLM's own vision tower: the signals of its layers, computed as the library computes them.

vLLM's towers return features and nothing else. Each of their attention modules hands queries and keys, after
projection, normalisation and rotation, to a module that attends; here they are seen on the way there, for the layers
that are asked for. The modules stay as they are, and a signal makes no matrix that it does not make in transformers.

How a tower is built, and how values of patches become values of tokens, the library's adapter knows. It is given a
model without weights that transformers makes of the same configuration (`adapter_of`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter, layers_around
from vtc.core.observations import VisionAttention, VisionHidden
from vtc.core.signals import Signal, VisionSignal
from vtc.engine.plan import PlannedStage
from vtc.errors import StateError, UnsupportedModelError
from vtc.registry import get_adapter

__all__ = ["Seen", "Tower", "adapter_of", "reads_tower", "tower_signals"]

Seen = dict[tuple[Signal, int], list[Tensor]]
"""Of a signal and a layer, what every run of the tower showed, per patch: (B, M, ...) each."""

_ADAPTERS: dict[str, Adapter] = {}


def adapter_of(config: Any) -> Adapter:
    """Return the library's adapter for a configuration, on a model of transformers without weights.

    Raises
    ------
    UnsupportedModelError
        transformers has no such model, or the library no such adapter.
    """
    text = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if text not in _ADAPTERS:
        import transformers

        kind = get_adapter(config.model_type)
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForImageTextToText.from_config(copy.deepcopy(config))
        except ValueError as error:
            raise UnsupportedModelError(
                f"vtc plans with the model that transformers makes of a configuration, and for {config.model_type} it "
                f"makes none: {error}"
            ) from error
        _ADAPTERS[text] = kind(model)
    return _ADAPTERS[text]


def tower_signals(stage: PlannedStage, modality: str) -> tuple[VisionSignal, ...]:
    """Return the signals of the tower that a stage reads of images, or of videos."""
    return tuple(
        signal for signal in stage.stage.requires if isinstance(signal, VisionSignal) and signal.wanted_of(modality)
    )


def reads_tower(stage: PlannedStage) -> bool:
    """Tell whether a stage reads signals of the tower at all."""
    return any(isinstance(signal, VisionSignal) for signal in stage.stage.requires)


class Tower:
    """The vision tower of one of vLLM's models.

    Parameters
    ----------
    adapter
        Of the same configuration.
    model
        vLLM's.
    attends
        The class of the modules that are handed queries and keys.
    packed
        Whether all images enter the tower as one sequence.
    """

    def __init__(self, adapter: Adapter, model: nn.Module, attends: type[nn.Module], *, packed: bool) -> None:
        self.adapter, self.packed = adapter, packed
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, attends)]
        if not found:
            raise UnsupportedModelError(f"vtc finds no attention in the vision tower of {type(model).__name__}.")
        self.attentions = [module for _, module in found]
        self._owners = [model.get_submodule(name.rpartition(".")[0]) for name, _ in found]
        self._blocks = layers_around(model, self.attentions)

    def encoded_as(self, modality: str) -> str:
        """Return as what the family encodes a modality: some encode frames of videos as images."""
        return "image" if self.adapter.video_as_images else modality

    @contextmanager
    def observed(
        self, signals: Sequence[VisionSignal], modality: str
    ) -> Iterator[dict[tuple[Signal, int], list[Tensor]]]:
        """Compute signals, per patch, while the tower runs.

        Yields
        ------
        Seen
            Filled by then; prefix tokens included.
        """
        found: Seen = {}
        readers: dict[tuple[type, int], list[VisionSignal]] = {}
        for signal in signals:
            for layer in self._layers(signal, modality):
                readers.setdefault((signal.reads, layer), []).append(signal)
        with ExitStack() as handles:
            for (kind, layer), wanting in readers.items():
                see = functools.partial(_take, found, layer, wanting)
                if kind is VisionAttention:
                    seen = functools.partial(self._attention, layer, modality, see)
                    hook = self.attentions[layer].register_forward_pre_hook(seen, with_kwargs=True)
                    handles.callback(hook.remove)
                else:
                    handles.enter_context(
                        _returning(self._blocks[layer], functools.partial(self._hidden, modality, see))
                    )
            yield found

    def values(
        self,
        found: Seen,
        runs: tuple[int, int],
        signal: VisionSignal,
        modality: str,
        carry: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the values of a signal per row (total, L, ...) that the tower showed in one of its runs.

        Parameters
        ----------
        found
            What was `observed`.
        runs
            The number of that run, and how many there were to be.
        carry
            Makes of values of patches (crops, M, C) those of rows (total, C).
        """
        prefix = self.adapter.prefix_tokens(modality)
        parts = [found.get((signal, layer), []) for layer in self._layers(signal, modality)]
        if any(len(part) != runs[1] for part in parts):
            seen = sorted({len(part) for part in parts})
            raise StateError(f"{signal.name} was seen {seen} times in vLLM's tower instead of {runs[1]}.")
        values = torch.stack([part[runs[0]][:, prefix:] for part in parts], dim=2)
        return carry(values.flatten(2)).unflatten(-1, values.shape[2:])

    def _layers(self, signal: VisionSignal, modality: str) -> tuple[int, ...]:
        depth = len(self.adapter.tower_attentions(modality))
        return signal.vision_layers(depth, self.adapter.feature_layer(modality, {}))

    @torch.no_grad()
    def _attention(
        self, layer: int, modality: str, see: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = dict(zip(("query", "key", "value", "cu_seqlens"), args, strict=False)) | kwargs
        world = int(getattr(self._owners[layer], "tp_size", 1))
        queries, keys, values = (
            _all_heads(part.unflatten(-1, (-1, module.head_size)) if part.dim() == 3 else part, world).transpose(1, 2)
            for part in (given["query"], given["key"], given["value"])
        )
        bounds, prefix = given.get("cu_seqlens"), self.adapter.prefix_tokens(modality)
        see(VisionAttention(queries, keys, values, module.scale, cu_seqlens=bounds, prefix=prefix))

    @torch.no_grad()
    def _hidden(self, modality: str, see: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.transpose(0, 1) if self.packed else hidden
        # Later layers may add to it in place.
        see(VisionHidden(hidden.clone(), self.adapter.prefix_tokens(modality)))


@contextmanager
def _returning(block: nn.Module, see: Callable[[Any], None]) -> Iterator[None]:
    """Hand what a layer returns to `see` while entered.

    Classes that vLLM may compile call `forward` themselves, past the hooks of modules, also when it does not.
    """
    forward, before = block.forward, block.__dict__.get("forward")

    @functools.wraps(forward)
    def seen(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        see(output)
        return output

    block.__dict__["forward"] = seen
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before


def _take(found: dict[tuple[Signal, int], list[Tensor]], layer: int, signals: Sequence[VisionSignal], raw: Any) -> None:
    for signal in signals:
        found.setdefault((signal, layer), []).append(signal.compute(raw).float())


def _all_heads(part: Tensor, world: int) -> Tensor:
    """Gather the heads (B, M, H, d) of all processes that share a layer, so that all of them choose alike."""
    if world == 1:
        return part
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(part.contiguous(), dim=2)
