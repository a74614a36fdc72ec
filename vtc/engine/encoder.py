"""Running the encoders of images and videos: their features, how these fall into images, and the signals of the tower.

What an encoder made can be kept in an `EncoderMemory` (`memory.py`) and read again by other methods, other options or
other questions about the same images: the towers then do not run again.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from vtc.adapters.base import Adapter, Layout, rows_of
from vtc.core.grids import Grid
from vtc.core.observations import Observation, PatchPixels, TokenGrids, VisionAttention, VisionHidden
from vtc.core.signals import Signal, VisionSignal
from vtc.core.sites import Site
from vtc.engine.hooks import Hooks
from vtc.engine.in_tower import TowerPass, refuse_checkpointing
from vtc.engine.memory import MEMORY, Changed, EncoderMemory, Place, Run
from vtc.engine.plan import Plan, PlannedStage, tower_layer
from vtc.engine.recorder import UNSEEN, masking, recording
from vtc.engine.resample import resample
from vtc.engine.shared import first_row, for_rows, output_for_rows
from vtc.engine.watch import (
    ENCODING,
    Watch,
    attention_observer,
    enter_block,
    hidden_observer,
    leave_cells,
    leave_tower,
    see_hidden,
    see_pixels,
)
from vtc.errors import InputError, StateError, UnsupportedModelError
from vtc.report.flops import block_flops

__all__ = ["Encoded", "Encoder"]


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
    survivors
        (total,) bool: rows that are left behind each site in the tower.
    spent
        Milliseconds that methods took at each site in the tower, and for signals of the pixels at any site.
    tower_flops
        FLOPs of the tower's layers with all patches, and with those that were left; None if none can leave.
    resampled
        Grids that the tokens of images or videos form, where pictures were made smaller before the tower.
    """

    modality: str
    features: torch.Tensor
    layout: Layout
    signals: dict[Signal, torch.Tensor]
    survivors: dict[Site, torch.Tensor] = field(default_factory=dict)
    spent: dict[Site, float] = field(default_factory=dict)
    tower_flops: tuple[int, int] | None = None
    resampled: list[Grid] | None = None


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
        reads_tower = plan.in_tower or any(isinstance(signal, VisionSignal) for signal in plan.signals)
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
        token = MEMORY.set((self, memory))
        try:
            yield
        finally:
            MEMORY.reset(token)

    @property
    def busy(self) -> bool:
        """Whether an encoder is running: some families encode a video by encoding its frames as images."""
        return ENCODING.get() is not None

    def install(self, hooks: Hooks) -> None:
        """Put hooks on the towers for the observations that signals read; they see the runs of `read` alone.

        They stay, rather than coming and going with each run: another thread may be in the tower just then.
        """
        towers: dict[nn.Module, None] = {}
        blocks: dict[nn.Module, None] = {}
        outlets: dict[nn.Module, None] = {}
        shortened: dict[nn.Module, int] = {}
        for modality in self.adapter.modalities:
            towers[self.adapter.tower(modality)] = None  # often one for all modalities
            wanted = [signal for signal in self.plan.token_signals if signal.wanted_of(modality)]
            pairs = _pairs(self._layers(modality, {}, wanted))
            pairs += [pair for stage in self._stages() for pair in _pairs(stage_layers(stage))]
            layers = {layer for signal, layer in pairs if signal.reads is VisionHidden}
            all_blocks = self.adapter.tower_blocks(modality) if layers or self.plan.in_tower else []
            blocks |= dict.fromkeys(all_blocks[layer] for layer in sorted(layers))
            shortened |= {block: layer for layer, block in enumerate(all_blocks) if self.plan.in_tower}
            outlets |= dict.fromkeys(self.adapter.tower_outlets(modality) if self.plan.in_tower else ())
        for tower in towers:
            hooks.before(tower, see_pixels)
            if self.plan.in_tower:
                hooks.after(tower, leave_tower)
        for block, layer in shortened.items():
            hooks.before(block, functools.partial(enter_block, layer))
        for outlet in outlets:
            hooks.after(outlet, leave_cells)
        for block in blocks:
            hooks.after(block, see_hidden)

    @property
    def memory(self) -> EncoderMemory | None:
        """The memory of this thread or task, if it has one."""
        active = MEMORY.get()
        return active[1] if active is not None and active[0] is self else None

    def remembered(self, modality: str) -> Any:
        """Return the output of an encoder that is in memory, or None."""
        memory = self.memory
        run = None if memory is None else memory.runs.get(modality)
        return None if run is None or memory is None else output_for_rows(run.output, memory.rows)

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
        memory = self.memory
        rows = 1 if memory is None else memory.rows
        if rows > 1:
            args, kwargs = first_row(args, kwargs, rows)
        output, encoded = self._read(memory, modality, original, args, kwargs)
        if rows > 1:
            output, encoded = for_rows(output, encoded, rows)
        self._known[_first_tensor(output)] = encoded
        return output, encoded

    def _read(
        self,
        memory: EncoderMemory | None,
        modality: str,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Encoded]:
        whole = call = self._arguments(modality, original, args, kwargs)
        smaller = None
        signals = [signal for signal in self.plan.token_signals if signal.wanted_of(modality)]
        layers = self._layers(modality, call, signals)
        if self.plan.changes_encoder and memory is not None:
            made = memory.changed.get(modality)
            if made is not None and made.stages == self.plan.before_features and made.signals == tuple(signals):
                return made.output, replace(made.encoded, spent={})
        if self.plan.resampling is not None:
            smaller = resample(self.adapter, self.plan.resampling, modality, call)
            args, kwargs, call = (), smaller.call, smaller.call
        run, found = self._run(memory, modality, call, layers, signals, original, args, kwargs)
        if getattr(run.output, "pooler_output", None) is None:
            raise InputError(f"get_{modality}_features returned no pooler_output; call it with return_dict=True")
        looking: dict[Site, float] = {}  # milliseconds: a second look at the pixels is the method's, not the model's
        with torch.no_grad():
            layout = self.adapter.layout(modality, call, run.output)
            for signal in signals:
                if signal in run.values:
                    continue
                if signal in layers:
                    values = self._patch_values(modality, signal, layers[signal], found, run.tower)
                    rows = self.adapter.patches_to_tokens(modality, call, values.flatten(2))
                    run.values[signal] = rows.unflatten(-1, values.shape[2:])
                elif signal.reads is PatchPixels:
                    began = time.perf_counter()
                    values = self._pixel_values(modality, call, signal, run.pixels)
                    flat = values.reshape(*values.shape[:2], -1)
                    rows = self.adapter.input_patches_to_tokens(modality, call, flat)
                    run.values[signal] = rows.reshape(len(rows), *values.shape[2:])
                    site = next(stage.site for stage in self.plan.stages if signal in stage.stage.requires)
                    looking[site] = looking.get(site, 0.0) + 1e3 * (time.perf_counter() - began)
            survivors = self._survivors(modality, call, run.tower, layout)
        known = {signal: run.values[signal] for signal in signals if signal in run.values}
        encoded = Encoded(modality, rows_of(run.output).detach(), layout, known, survivors)
        if run.tower is not None:
            encoded.spent, encoded.tower_flops = dict(run.tower.spent), self._tower_flops(modality, run.tower)
        for site, milliseconds in looking.items():
            encoded.spent[site] = encoded.spent.get(site, 0.0) + milliseconds
        output = run.output
        if smaller is not None:
            left = self._flops_of(modality, call) if encoded.tower_flops is None else encoded.tower_flops[1]
            encoded.tower_flops = self._flops_of(modality, whole), left
            output = smaller.output(run.output)
            encoded = smaller.encoded(encoded, output)
        if self.plan.changes_encoder and memory is not None and _repeatable(self.plan.before_features, output):
            memory.changed[modality] = Changed(self.plan.before_features, tuple(signals), output, encoded)
        return output, encoded

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
        if not wanted and not self.plan.in_tower:
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
        memory: EncoderMemory | None,
        modality: str,
        call: Mapping[str, Any],
        layers: Mapping[Signal, tuple[int, ...]],
        signals: Sequence[Signal],
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Run, dict[tuple[Signal, int], list[torch.Tensor]]]:
        """Run the encoder, or remember that it ran, and compute the signals of every layer as its values pass."""
        if self.plan.changes_encoder:  # what leaves the tower is of these stages alone: see `memory.Changed`
            memory = None
        known = None if memory is None else memory.runs.get(modality)
        missing = [signal for signal in signals if known is None or signal not in known.values]
        readers: dict[Place, dict[Signal, None]] = {}  # each once
        wanted = [(signal, layer) for signal in missing for layer in layers.get(signal, ())]
        for signal, layer in wanted + [pair for stage in self._stages() for pair in _pairs(stage_layers(stage))]:
            readers.setdefault((signal.reads, layer), {})[signal] = None
        in_tower = [signal for stage in self._stages() for signal in stage.stage.requires]
        by_pixels = any(signal.reads is PatchPixels for signal in [*missing, *in_tower])
        found: dict[tuple[Signal, int], list[torch.Tensor]] = {}

        def take(place: Place, raw: Observation) -> None:
            for signal in readers[place]:
                found.setdefault((signal, place[1]), []).append(signal.compute(raw).float())

        if known is not None and known.observed.keys() >= readers.keys() and (known.pixels or not by_pixels):
            with torch.no_grad():
                for place in readers:
                    for raw in known.observed[place]:
                        take(place, raw)
            return known, found

        keep = memory is not None and memory.observations
        run = Run(None)

        def see(place: Place, raw: Observation) -> None:
            take(place, raw)
            if keep:
                run.observed.setdefault(place, []).append(raw)

        def values(stage: PlannedStage) -> dict[Signal, torch.Tensor]:
            own = stage_layers(stage)
            return {
                signal: self._patch_values(modality, signal, own[signal], found, watch.tower)
                if signal in own
                else self._pixel_values(modality, call, signal, run.pixels)
                for signal in stage.stage.requires
                if signal.reads is not TokenGrids
            }

        def begin(rows: torch.Tensor) -> TowerPass:
            tower, prefix = self.adapter.tower(modality), self.adapter.prefix_tokens(modality)
            refuse_checkpointing(tower)
            units = self.adapter.tower_units(modality, call, len(rows), rows.shape[1] - prefix)
            config: Any = tower.config
            flash = "flash" in str(config._attn_implementation)
            return TowerPass(units, self.plan.in_tower, prefix, modality, values, flash=flash)

        watch = Watch(
            run.pixels if by_pixels or keep else None,
            begin=begin if self.plan.in_tower else None,
            packed=self.adapter.packed_lengths(modality, call),
        )
        with self._observing(modality, list(readers), see, watch):
            run.output = original(*args, **kwargs)
        run.tower = watch.tower
        if known is not None:  # another run of the same encoder on the same pixels
            run.observed, run.values = {**known.observed, **run.observed}, known.values
        if memory is not None:
            memory.runs[modality] = run
        return run, found

    @contextmanager
    def _observing(
        self,
        modality: str,
        places: Sequence[Place],
        see: Callable[[Place, Observation], None],
        watch: Watch,
    ) -> Iterator[None]:
        """Let `watch` watch the encoder, and hand the observations of these layers to `see`, while entered."""
        prefix = self.adapter.prefix_tokens(modality)
        attentions: dict[nn.Module, Any] = {}
        for kind, layer in places:
            if kind is VisionAttention:
                attentions[self.adapter.tower_attentions(modality)[layer]] = attention_observer(layer, prefix, see)
            else:
                watch.hidden[self.adapter.tower_blocks(modality)[layer]] = hidden_observer(layer, prefix, see)
        token = ENCODING.set(watch)
        try:
            with recording(attentions), masking(watch.extra_mask) if watch.begin else nullcontext():
                yield
        finally:
            ENCODING.reset(token)

    def _tower_flops(self, modality: str, tower: TowerPass) -> tuple[int, int]:
        """Return the FLOPs of the tower's layers on all patches, and on those that were left."""
        blocks = self.adapter.tower_blocks(modality)
        loads = tower.loads().items()
        before, after = zip(
            *([block_flops(blocks[layer], *load) for load in pair] for layer, pair in loads), strict=True
        )
        return sum(before), sum(after)

    def _flops_of(self, modality: str, call: Mapping[str, Any]) -> int:
        """Return the FLOPs of the tower's layers on the pictures of a call."""
        sequences = self.adapter.tower_sequences(modality, call)
        loads = [(int(lengths.sum()), int((lengths.long() ** 2).sum())) for lengths in sequences]
        return sum(
            block_flops(block, *load) for block, load in zip(self.adapter.tower_blocks(modality), loads, strict=True)
        )

    def _stages(self) -> list[PlannedStage]:
        """Stages inside the tower."""
        return [stage for stages in self.plan.in_tower.values() for stage in stages]

    def _patch_values(
        self,
        modality: str,
        signal: Signal,
        layers: Sequence[int],
        found: Mapping[tuple[Signal, int], list[torch.Tensor]],
        tower: TowerPass | None,
    ) -> torch.Tensor:
        """Stack the values of a signal per patch, (C, M, L, ...); zeros where patches have left by then."""
        prefix = self.adapter.prefix_tokens(modality)
        per_layer = []
        for layer in layers:
            parts = found.get((signal, layer))
            if not parts:
                raise StateError(f"the tower ran without its attention being seen: {UNSEEN}")
            # Packed towers take their images one by one; together they are one crop.
            values = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            per_layer.append((values if tower is None else tower.restore_rows(values, layer))[:, prefix:])
        return torch.stack(per_layer, dim=2)

    def _pixel_values(
        self, modality: str, call: Mapping[str, Any], signal: Signal, pixels: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute a signal of the pixels per patch, (C, M, ...)."""
        given = torch.cat(list(pixels))
        crops, size = self.adapter.patch_pixels(modality, call, given)
        pictures = functools.partial(self.adapter.pictures, modality, call, crops) if size is None else None
        packed = given.dim() == 2 or self.adapter.packed_lengths(modality, call) is not None
        return signal.compute(PatchPixels(tuple(crops), size, packed=packed, pictures=pictures))

    def _survivors(
        self, modality: str, call: Mapping[str, Any], tower: TowerPass | None, layout: Layout
    ) -> dict[Site, torch.Tensor]:
        """Carry what is left behind each site in the tower to the feature rows, (total,) bool.

        Raises
        ------
        UnsupportedModelError
            A feature is made of patches that left and of patches that stayed.
        """
        found: dict[Site, torch.Tensor] = {}
        prefix = self.adapter.prefix_tokens(modality)
        for site, left in {} if tower is None else tower.survivors.items():
            share = self.adapter.patches_to_tokens(modality, call, left[:, prefix:, None].float())[:, 0]
            mixed = (share > 1e-3) & (share < 1 - 1e-3)
            if bool((mixed & ~layout.structural.to(mixed.device)).any()):
                raise UnsupportedModelError(
                    f"features of this {modality} are interpolated across patches of which some left at "
                    f"{str(site)!r}, so that none is exact; use at='decoder', or pictures that the model does not "
                    "interpolate"
                )
            found[site] = (share > 0.5) | layout.structural.to(share.device)
        return found


def stage_layers(stage: PlannedStage) -> dict[Signal, tuple[int, ...]]:
    """Return the tower layers of the signals that a stage inside the tower requires: those that have run by then."""
    layer = tower_layer(stage.site)
    wanted = [signal for signal in stage.stage.requires if isinstance(signal, VisionSignal)]
    return {signal: signal.vision_layers(layer, layer - 1) for signal in wanted}


def _repeatable(stages: Sequence[PlannedStage], output: Any) -> bool:
    """Tell whether stages would give this output again: modules may be in training, and an output carry a graph."""
    return not any(stage.selector.trained for stage in stages) and not _first_tensor(output).requires_grad


def _pairs(layers: Mapping[Signal, tuple[int, ...]]) -> list[tuple[Signal, int]]:
    return [(signal, layer) for signal, each in layers.items() for layer in each]


def _first_tensor(output: Any) -> torch.Tensor:
    pooled = output.pooler_output
    while not isinstance(pooled, torch.Tensor):
        pooled = pooled[0]
    return pooled
