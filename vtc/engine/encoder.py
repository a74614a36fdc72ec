"""Running the encoders of images and videos: their features, how these fall into images, and the signals of the tower.

What an encoder made can be kept in an `EncoderMemory` and read again by other methods, other options or other questions
about the same images: the towers then do not run again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from vtc.adapters.base import Adapter, Layout, rows_of
from vtc.core.observations import Observation, PatchPixels, VisionAttention, VisionHidden
from vtc.core.signals import Signal, VisionSignal
from vtc.engine.hooks import Hooks
from vtc.engine.plan import Plan
from vtc.engine.recorder import UNSEEN, recording
from vtc.errors import InputError, StateError

__all__ = ["Encoded", "Encoder", "EncoderMemory"]


@dataclass(eq=False)
class Encoded:
    """One call of an encoder, as the engine reads it.

    Attributes
    ----------
    modality
    features
        (total, D) rows of all its images or videos.
    layout
        How these fall into images or videos.
    signals
        Values per row, (total, ...), not yet in the form that methods see.
    """

    modality: str
    features: torch.Tensor
    layout: Layout
    signals: dict[Signal, torch.Tensor]


_Place = tuple[type[Observation], int]
"""An observation and a layer."""


@dataclass(eq=False)
class _Run:
    """The output of an encoder, the signals read from it, and observations of its layers and its input."""

    output: Any
    pixels: list[torch.Tensor] = field(default_factory=list)
    observed: dict[_Place, list[Observation]] = field(default_factory=dict)
    values: dict[Signal, torch.Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class EncoderMemory:
    """Results of the encoders for the images and videos of one prompt, by modality.

    Pass it to `Engine.remember`.

    Attributes
    ----------
    observations
        Keep also the observations of the layers that were read, so that signals with other parameters can be computed
        without running the encoder again. They are as large as the tower's queries, keys and values.
    """

    observations: bool = False
    runs: dict[str, _Run] = field(default_factory=dict)


@dataclass(eq=False)
class _Watch:
    """What is to be seen of the encoder that this thread or task runs."""

    pixels: list[torch.Tensor] | None = None
    hidden: dict[nn.Module, Callable[[Any], None]] = field(default_factory=dict)


_ENCODING: ContextVar[_Watch | None] = ContextVar("vtc_encoding", default=None)
_MEMORY: ContextVar[tuple[Any, EncoderMemory] | None] = ContextVar("vtc_encoder_memory", default=None)


class Encoder:
    """Reads the encoders of one model.

    Parameters
    ----------
    adapter : Adapter
    plan : Plan
        The signals of its stages are read, nothing more.
    """

    def __init__(self, adapter: Adapter, plan: Plan) -> None:
        self.adapter, self.plan = adapter, plan
        reads_tower = any(isinstance(signal, VisionSignal) for signal in plan.signals)
        # As they were when the plan was made: a call, or a changed configuration, may ask for another one.
        self._feature_layers = {m: adapter.feature_layer(m, {}) for m in adapter.modalities if reads_tower}
        self._signatures: dict[str, inspect.Signature] = {}
        # Features that a caller encodes once and passes on are recognised by their tensor.
        self._known: Any = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "_signatures": {}}  # a copy has encoded nothing yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _known=WeakTensorKeyDictionary())

    @contextmanager
    def remember(self, memory: EncoderMemory) -> Iterator[None]:
        """Keep what is encoded in `memory`, and take from there what is there already, while entered."""
        token = _MEMORY.set((self, memory))
        try:
            yield
        finally:
            _MEMORY.reset(token)

    @property
    def busy(self) -> bool:
        """Whether an encoder is running: some families encode a video by encoding its frames as images."""
        return _ENCODING.get() is not None

    def install(self, hooks: Hooks) -> None:
        """Put hooks on the towers for the observations that signals read; they see the runs of `read` alone.

        They stay, rather than coming and going with each run: another thread may be in the tower just then.
        """
        towers: dict[nn.Module, None] = {}
        blocks: dict[nn.Module, None] = {}
        for modality in self.adapter.modalities:
            towers[self.adapter.tower(modality)] = None  # often one for all modalities
            for signal in self.plan.signals:
                if signal.reads is VisionHidden and signal.wanted_of(modality):
                    all_blocks = self.adapter.tower_blocks(modality)
                    layers = signal.vision_layers(len(all_blocks), self._feature_layers[modality])
                    blocks |= dict.fromkeys(all_blocks[layer] for layer in layers)
        for tower in towers:
            hooks.before(tower, _see_pixels)
        for block in blocks:
            hooks.after(block, _see_hidden)

    def remembered(self, modality: str) -> Any:
        """Return the output of an encoder that is in memory, or None."""
        active = _MEMORY.get()
        run = active[1].runs.get(modality) if active is not None and active[0] is self else None
        return None if run is None else run.output

    def encoded(self, output: Any) -> Encoded | None:
        """Return what was read while `output` was made; None if it was made elsewhere."""
        return self._known.get(_first_tensor(output))

    def read(
        self, modality: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Encoded]:
        """Run the encoder `original` and return its output beside what was read.

        Raises
        ------
        InputError
            The output carries no features.
        StateError
            The call reads another tower layer than the plan was made for, or no attention was seen.
        """
        call = self._arguments(modality, original, args, kwargs)
        signals = [signal for signal in self.plan.signals if signal.wanted_of(modality)]
        layers = self._layers(modality, call, signals)
        run, found = self._run(modality, layers, signals, original, args, kwargs)
        if getattr(run.output, "pooler_output", None) is None:
            raise InputError(f"get_{modality}_features returned no pooler_output; call it with return_dict=True")
        with torch.no_grad():
            layout = self.adapter.layout(modality, call, run.output)
            for signal in signals:
                if signal in run.values:
                    continue
                if signal in layers:
                    run.values[signal] = self._vision_values(modality, call, signal, layers[signal], found)
                elif signal.reads is PatchPixels:
                    run.values[signal] = self._pixel_values(modality, call, signal, torch.cat(run.pixels))
        values = {signal: run.values[signal] for signal in signals if signal in run.values}
        encoded = Encoded(modality, rows_of(run.output).detach(), layout, values)
        self._known[_first_tensor(run.output)] = encoded
        return run.output, encoded

    def _arguments(self, modality: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if modality not in self._signatures:
            self._signatures[modality] = inspect.signature(original)
        call = dict(self._signatures[modality].bind_partial(*args, **kwargs).arguments)
        return call | call.pop("kwargs", {})

    def _layers(
        self, modality: str, call: Mapping[str, Any], signals: Sequence[Signal]
    ) -> dict[Signal, tuple[int, ...]]:
        """Return the tower layers of every signal that reads some."""
        wanted = [signal for signal in signals if isinstance(signal, VisionSignal)]
        if not wanted:
            return {}
        depth, feature_layer = len(self.adapter.tower_attentions(modality)), self.adapter.feature_layer(modality, call)
        if feature_layer != self._feature_layers[modality]:
            raise StateError(
                f"this call reads the features of tower layer {feature_layer}, but compress() prepared another one; "
                "call compress() again after changing vision_feature_layer"
            )
        return {signal: signal.vision_layers(depth, feature_layer) for signal in wanted}

    def _run(
        self,
        modality: str,
        layers: Mapping[Signal, tuple[int, ...]],
        signals: Sequence[Signal],
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[_Run, dict[tuple[Signal, int], list[torch.Tensor]]]:
        """Run the encoder, or remember that it ran, and compute the signals of every layer as its values pass."""
        active = _MEMORY.get()
        memory = active[1] if active is not None and active[0] is self else None
        known = None if memory is None else memory.runs.get(modality)
        missing = [signal for signal in signals if known is None or signal not in known.values]
        readers: dict[_Place, list[Signal]] = {}
        for signal in missing:
            for layer in layers.get(signal, ()):
                readers.setdefault((signal.reads, layer), []).append(signal)
        by_pixels = any(signal.reads is PatchPixels for signal in missing)
        found: dict[tuple[Signal, int], list[torch.Tensor]] = {}

        def take(place: _Place, raw: Observation) -> None:
            for signal in readers[place]:
                found.setdefault((signal, place[1]), []).append(signal.compute(raw).float())

        if known is not None and known.observed.keys() >= readers.keys() and (known.pixels or not by_pixels):
            with torch.no_grad():
                for place in readers:
                    for raw in known.observed[place]:
                        take(place, raw)
            return known, found

        keep = memory is not None and memory.observations
        run = _Run(None)

        def see(place: _Place, raw: Observation) -> None:
            take(place, raw)
            if keep:
                run.observed.setdefault(place, []).append(raw)

        with self._observing(modality, list(readers), see, run.pixels if by_pixels or keep else None):
            run.output = original(*args, **kwargs)
        if known is not None:  # another run of the same encoder on the same pixels
            run.observed, run.values = {**known.observed, **run.observed}, known.values
        if memory is not None:
            memory.runs[modality] = run
        return run, found

    @contextmanager
    def _observing(
        self,
        modality: str,
        places: Sequence[_Place],
        see: Callable[[_Place, Observation], None],
        pixels: list[torch.Tensor] | None,
    ) -> Iterator[None]:
        """Hand the observations of these layers to `see`, and the tower's input to `pixels`, while entered."""
        prefix = self.adapter.prefix_tokens(modality)
        attentions: dict[nn.Module, Any] = {}
        watch = _Watch(pixels)
        for kind, layer in places:
            if kind is VisionAttention:
                attentions[self.adapter.tower_attentions(modality)[layer]] = _attention_observer(layer, prefix, see)
            else:
                watch.hidden[self.adapter.tower_blocks(modality)[layer]] = _hidden_observer(layer, prefix, see)
        token = _ENCODING.set(watch)
        try:
            with recording(attentions):
                yield
        finally:
            _ENCODING.reset(token)

    def _vision_values(
        self,
        modality: str,
        call: Mapping[str, Any],
        signal: Signal,
        layers: Sequence[int],
        found: Mapping[tuple[Signal, int], list[torch.Tensor]],
    ) -> torch.Tensor:
        """Carry the values of a signal to the feature rows, (total, L, ...)."""
        prefix = self.adapter.prefix_tokens(modality)
        per_layer = []
        for layer in layers:
            parts = found.get((signal, layer))
            if not parts:
                raise StateError(f"the tower ran without its attention being seen: {UNSEEN}")
            # Packed towers take their images one by one; together they are one crop.
            per_layer.append((torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])[:, prefix:])
        stacked = torch.stack(per_layer, dim=2)  # (crops, M, L, ...)
        rows = self.adapter.patches_to_tokens(modality, call, stacked.flatten(2))
        return rows.unflatten(-1, stacked.shape[2:])

    def _pixel_values(
        self, modality: str, call: Mapping[str, Any], signal: Signal, pixels: torch.Tensor
    ) -> torch.Tensor:
        """Compute a signal of the pixels per feature row, (total, ...)."""
        crops, size = self.adapter.patch_pixels(modality, call, pixels)
        values = signal.compute(PatchPixels(tuple(crops), size, packed=pixels.dim() == 2))
        rows = self.adapter.input_patches_to_tokens(modality, call, values.reshape(*values.shape[:2], -1))
        return rows.reshape(len(rows), *values.shape[2:])


def _attention_observer(layer: int, prefix: int, see: Any) -> Callable[..., None]:
    def record(query: Any, key: Any, value: Any, mask: Any, scaling: float, kwargs: Mapping[str, Any]) -> None:
        # A flash kernel gets all images of a packed tower in one call; the others get them one by one.
        bounds = kwargs.get("cu_seq_lens_q")
        allowed = _allowed(mask) if bounds is None else None
        see((VisionAttention, layer), VisionAttention(query, key, value, scaling, allowed, bounds, prefix))

    return record


def _hidden_observer(layer: int, prefix: int, see: Any) -> Callable[[Any], None]:
    def record(output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        see((VisionHidden, layer), VisionHidden(hidden[None] if hidden.dim() == 2 else hidden, prefix))

    return record


@torch.no_grad()
def _see_hidden(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Hand the output of a layer to the run that watches it."""
    watch = _ENCODING.get()
    if watch is not None and module in watch.hidden:
        watch.hidden[module](output)


def _see_pixels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note what a tower is given: it gets the pixels without padding and in its own shape."""
    watch = _ENCODING.get()
    if watch is not None and watch.pixels is not None:
        values = (*args, *kwargs.values())
        watch.pixels.append(next(value for value in values if isinstance(value, torch.Tensor)).detach())


def _allowed(mask: Any) -> torch.Tensor | None:
    """Convert any mask of an attention function to (B, 1, Lq or 1, M) bool: the keys that a query may attend to."""
    if mask is None or not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, None, None].bool()
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _first_tensor(output: Any) -> torch.Tensor:
    pooled = output.pooler_output
    while not isinstance(pooled, torch.Tensor):
        pooled = pooled[0]
    return pooled
