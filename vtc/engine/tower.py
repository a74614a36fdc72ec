"""Reading a vision tower while it runs: features, how they fall into images, and the scores that selectors want."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vtc import kernels
from vtc.adapters.base import Adapter, rows_of
from vtc.core.context import Need
from vtc.engine.plan import PlannedStage, parameters_of, wanted
from vtc.engine.prompt import Encoded
from vtc.engine.recorder import AttentionTap, attach
from vtc.errors import InputError, StateError, UnsupportedMethodError

_TAP: dict[Need, str] = {
    Need.CLS_ATTENTION: "cls_rows",
    Need.RECEIVED_ATTENTION: "received",
    Need.KEYS: "keys",
}
"""What a tap on the tower is told to record for a need."""

TOWER_NEEDS = frozenset({*_TAP, Need.CONTEXT_RELEVANCE})
"""What is read from the tower's attention."""


@dataclass(eq=False)
class TowerMemory:
    """What the towers made of one prompt, so that other methods and options can read it without running them again.

    Attributes
    ----------
    outputs : mapping of modality to ModelOutput
        Of the encoders.
    pixels : mapping of modality to list of Tensor
        What the towers were given.
    calls : mapping of (modality, layer) to list
        What taps observed there, see `AttentionTap`.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    pixels: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    calls: dict[tuple[str, int], list[tuple[Any, ...]]] = field(default_factory=dict)


class TowerReader:
    """Reads the towers of one model.

    Parameters
    ----------
    adapter : Adapter
    stages : sequence of PlannedStage
        What they require is read, nothing more.

    Attributes
    ----------
    memory : TowerMemory or None
        What is read is kept there, and taken from there if it is there.
    """

    def __init__(self, adapter: Adapter, stages: Sequence[PlannedStage]) -> None:
        self.adapter, self.stages = adapter, tuple(stages)
        self.attention_needs = {modality: wanted(stages, TOWER_NEEDS, modality) for modality in adapter.modalities}
        self.busy = False
        self.memory: TowerMemory | None = None
        self._parameters: dict[str, inspect.Signature] = {}

    def attach(self, modality: str) -> None:
        """Put taps on the layers that will be read, before the encoder is wrapped."""
        self._parameters[modality] = inspect.signature(getattr(self.adapter.base, f"get_{modality}_features"))
        needs = self.attention_needs[modality]
        layers = self.adapter.tower_attentions(modality)
        for layer in self._tapped_layers(modality, {}):
            if "_vtc_tap" not in layers[layer].__dict__:
                attach(layers[layer], AttentionTap())
            tap = layers[layer].__dict__["_vtc_tap"]  # which images and videos may share
            for need in needs & _TAP.keys():
                setattr(tap, _TAP[need], True)
            if Need.CONTEXT_RELEVANCE in needs:
                prefix = self.adapter.prefix_tokens(modality)
                parameters = parameters_of(self.stages, Need.CONTEXT_RELEVANCE)
                read = functools.partial(_context_relevance, prefix=prefix, **parameters)
                tap.readers[Need.CONTEXT_RELEVANCE.value] = read

    def _tapped_layers(self, modality: str, call: dict[str, Any]) -> tuple[int, ...]:
        if not self.attention_needs[modality]:
            return ()
        depth = len(self.adapter.tower_attentions(modality))
        feature_layer = self.adapter.feature_layer(modality, call)
        chosen = {
            stage.selector.vision_layers(depth, feature_layer)
            for stage in self.stages
            if stage.wants(modality) & TOWER_NEEDS
        }
        if len(chosen) > 1:
            raise UnsupportedMethodError(
                f"the composed methods read different tower layers {sorted(chosen)}; choose the same"
            )
        return chosen.pop()

    def read(self, modality: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Encoded]:
        """Run the encoder `original` and return its output beside what was read.

        Raises
        ------
        InputError
            The output carries no features.
        StateError
            The call reads another tower layer than `attach` prepared, or the taps saw nothing.
        """
        call = dict(self._parameters[modality].bind_partial(*args, **kwargs).arguments)
        call |= call.pop("kwargs", {})
        layers = self._tapped_layers(modality, call)
        attentions = self.adapter.tower_attentions(modality) if layers else []
        taps: list[Any] = [attentions[layer].__dict__.get("_vtc_tap") for layer in layers]
        if None in taps:
            raise StateError(
                f"this call reads the features of tower layer {self.adapter.feature_layer(modality, call)}, "
                "but compress() prepared another one; call compress() again after changing vision_feature_layer"
            )
        self.busy = True
        for tap in taps:
            tap.start()
        try:
            output, pixels = self._encode(modality, dict(zip(layers, taps, strict=True)), original, args, kwargs)
        finally:
            self.busy = False
            records = [tap.stop() for tap in taps]
        if getattr(output, "pooler_output", None) is None:
            raise InputError(f"get_{modality}_features returned no pooler_output; call it with return_dict=True")
        with torch.no_grad():
            layout = self.adapter.layout(modality, call, output)
            needs = {need: self._needs(modality, call, need, records) for need in self.attention_needs[modality]}
            if self._reads_pixels:
                needs[Need.ENTROPY] = self._entropy(modality, call, torch.cat(pixels))
        encoded = Encoded(modality, rows_of(output).detach(), layout, needs)
        output._vtc_encoded = encoded  # follows features that are computed once and passed on
        return output, encoded

    def _encode(
        self,
        modality: str,
        taps: dict[int, AttentionTap],
        original: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, list[torch.Tensor]]:
        """The encoder's output and what the tower was given, while started `taps` observe; from memory if it can be."""
        memory = self.memory
        if memory is not None and modality in memory.outputs and all((modality, at) in memory.calls for at in taps):
            for layer, tap in taps.items():
                for call in memory.calls[modality, layer]:
                    tap.observe(*call)
            return memory.outputs[modality], memory.pixels[modality]
        pixels: list[torch.Tensor] = []
        grabbed = self._grab_pixels(modality, pixels) if self._reads_pixels or memory is not None else None
        for tap in taps.values():
            tap.calls = None if memory is None else []
        try:
            output = original(*args, **kwargs)
        finally:
            if grabbed is not None:
                grabbed.remove()
        if memory is not None:
            memory.outputs[modality], memory.pixels[modality] = output, pixels
            memory.calls.update({(modality, layer): tap.calls or [] for layer, tap in taps.items()})
        return output, pixels

    @property
    def _reads_pixels(self) -> bool:
        return bool(wanted(self.stages, frozenset({Need.ENTROPY})))

    def _needs(
        self, modality: str, call: dict[str, Any], need: Need, records: list[list[dict[str, torch.Tensor]]]
    ) -> torch.Tensor:
        """Tower values per feature row, (total, layers, ...)."""
        name = need.value
        prefix = self.adapter.prefix_tokens(modality)
        layers = []
        for record in records:
            if not record:
                raise StateError(
                    "the tower ran without its attention being seen; was its attention implementation registered after "
                    "compress()? call compress() again"
                )
            parts = [part[name].movedim(-1, 1) if need is not Need.KEYS else part[name] for part in record]  # (B, M, C)
            # Packed towers take their images one by one; together they are one crop.
            layers.append((torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])[:, prefix:].float())
        stacked = torch.stack(layers, dim=2)  # (crops, M, layers, C)
        tokens = self.adapter.patches_to_tokens(modality, call, stacked.flatten(2))
        return tokens.unflatten(-1, stacked.shape[2:])

    def _grab_pixels(self, modality: str, into: list[torch.Tensor]) -> RemovableHandle:
        """Note what the tower is given: it gets the pixels without padding and in its own shape."""

        def grab(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)).detach())

        return self.adapter.tower(modality).register_forward_pre_hook(grab, with_kwargs=True)

    def _entropy(self, modality: str, call: dict[str, Any], pixels: torch.Tensor) -> torch.Tensor:
        """Share in the pixel entropy of its crop per feature row, (total,)."""
        crops, size = self.adapter.patch_pixels(modality, call, pixels)
        parameters = parameters_of(self.stages, Need.ENTROPY)
        channels = crops[0].shape[-3 if size else -2]
        mean, std = (
            torch.as_tensor(parameters[name], dtype=torch.float32, device=pixels.device).expand(channels)
            for name in ("mean", "std")
        )
        shares = [kernels.patch_entropy(crop, mean, std, size=size).softmax(dim=0) for crop in crops]
        patches = torch.cat(shares)[None] if pixels.dim() == 2 else torch.stack(shares)  # packed towers: one crop
        return self.adapter.input_patches_to_tokens(modality, call, patches[..., None])[:, 0]


def _context_relevance(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`kernels.context_relevance` with an axis for the heads it is averaged over, as every record of a tap has one."""
    return kernels.context_relevance(*args, **kwargs)[:, None]
