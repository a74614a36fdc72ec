"""The plan of a compression: its stages in the order in which tokens meet them, checked against what the model has.

Everything that can be refused is refused here, before the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.budget import resolve_budget
from vtc.config import CompressionConfig
from vtc.core.actions import Action
from vtc.core.eviction import CacheSelector
from vtc.core.observations import (
    DecoderAttention,
    DecoderCall,
    DecoderHidden,
    DecoderProbe,
    DecoderUpdate,
    EnteredAttention,
    PatchPixels,
    PromptText,
    TokenGrids,
    VisionAttention,
    VisionHidden,
)
from vtc.core.selector import Selector
from vtc.core.signals import ClsAttention, ProbeSignal, Signal, VisionSignal
from vtc.core.sites import (
    BeforeDecoder,
    CacheAfterPrefill,
    CacheWhileDecoding,
    DecoderLayer,
    Pixels,
    Site,
    VisionLayer,
)
from vtc.core.stage import ModelShape, Stage
from vtc.core.updating import UpdatingSelector
from vtc.engine.masks import LayerTypes
from vtc.errors import ConfigError, UnsupportedMethodError, UnsupportedModelError
from vtc.registry import get_selector

__all__ = ["Plan", "PlannedStage", "make_plan", "no_merging_with_flash", "shape_of", "tower_layer"]

ACTIONS: dict[type[Site], frozenset[Action]] = {
    Pixels: frozenset({Action.KEEP, Action.RESAMPLE}),
    VisionLayer: frozenset({Action.KEEP, Action.MERGE}),
    BeforeDecoder: frozenset({Action.KEEP, Action.MERGE, Action.REPLACE}),
    DecoderLayer: frozenset({Action.KEEP, Action.MERGE, Action.UPDATE}),
    CacheAfterPrefill: frozenset({Action.EVICT}),
    CacheWhileDecoding: frozenset({Action.EVICT}),
}
"""Actions that the engine can carry out at each kind of site."""

_CACHES = (CacheAfterPrefill, CacheWhileDecoding)

_BEFORE = BeforeDecoder().order

_IN_DECODER = (DecoderAttention, DecoderHidden, EnteredAttention)

_OF_PICTURES = (PatchPixels, TokenGrids, VisionAttention, VisionHidden)

_AT_CACHE = (DecoderAttention, DecoderCall, DecoderHidden, DecoderUpdate)


@dataclass(frozen=True)
class PlannedStage:
    """One stage of one configured method."""

    config: CompressionConfig
    selector: Selector
    stage: Stage

    @property
    def site(self) -> Site:
        """The site of the stage."""
        return self.stage.site

    def budget(self, n: int) -> int:
        """Compute how many of `n` tokens may stay; a stage with a ratio of its own may keep none."""
        if self.stage.keep is not None:
            return max(round(n * self.stage.keep), 1 if isinstance(self.site, BeforeDecoder) else 0)
        return resolve_budget(n, self.config.keep_ratio, self.config.keep_tokens)

    @property
    def keep_ratio(self) -> float | None:
        """Fraction behind `budget`, if it is one."""
        return self.config.keep_ratio if self.stage.keep is None else self.stage.keep

    def with_tokens(self, count: int | None) -> PlannedStage:
        """Return the stage with a budget of `count` tokens instead of the configured one; None: as it is."""
        if count is None:
            return self
        return replace(self, config=replace(self.config, keep_ratio=None, keep_tokens=count))


@dataclass(frozen=True)
class Plan:
    """All stages of a compression.

    Attributes
    ----------
    configs
        As given.
    stages
        In the order in which tokens meet them.
    shape
        Of the model that the plan was made for.
    """

    configs: tuple[CompressionConfig, ...]
    stages: tuple[PlannedStage, ...]
    shape: ModelShape

    @cached_property
    def in_tower(self) -> dict[int, tuple[PlannedStage, ...]]:
        """Tower layer to the stages on entering it; patches that leave at the pixels do so before layer 0."""
        stages: dict[int, tuple[PlannedStage, ...]] = {}
        for stage in self.stages:
            if isinstance(stage.site, (Pixels, VisionLayer)) and stage.stage.action is not Action.RESAMPLE:
                layer = tower_layer(stage.site)
                stages[layer] = (*stages.get(layer, ()), stage)
        return stages

    @cached_property
    def resampling(self) -> PlannedStage | None:
        """The stage that makes pictures smaller before they enter the tower, if there is one."""
        return next((stage for stage in self.stages if stage.stage.action is Action.RESAMPLE), None)

    @property
    def changes_encoder(self) -> bool:
        """Whether the encoder gives something else than that of the uncompressed model."""
        return bool(self.in_tower) or self.resampling is not None

    @cached_property
    def before_features(self) -> tuple[PlannedStage, ...]:
        """Stages at the pixels and inside the tower."""
        return tuple(stage for stage in self.stages if isinstance(stage.site, (Pixels, VisionLayer)))

    @cached_property
    def before_decoder(self) -> tuple[PlannedStage, ...]:
        """Stages before the language model."""
        return tuple(stage for stage in self.stages if isinstance(stage.site, BeforeDecoder))

    @cached_property
    def in_decoder(self) -> dict[int, PlannedStage]:
        """Decoder layer to the stage on entering it at which tokens leave."""
        pruning = (stage for stage in self.stages if stage.stage.action is not Action.UPDATE)
        return {stage.site.layer: stage for stage in pruning if isinstance(stage.site, DecoderLayer)}

    @cached_property
    def updates(self) -> dict[int, tuple[PlannedStage, ...]]:
        """Decoder layer to the stages on entering it that update hidden states, once tokens have left."""
        found: dict[int, tuple[PlannedStage, ...]] = {}
        for stage in self.stages:
            if isinstance(stage.site, DecoderLayer) and stage.stage.action is Action.UPDATE:
                found[stage.site.layer] = (*found.get(stage.site.layer, ()), stage)
        return found

    @cached_property
    def layer_changes(self) -> tuple[tuple[str, Callable[[Tensor], Tensor]], ...]:
        """What is added to the outputs of layers of the language model, by their names."""
        selectors = {id(stage.selector): stage.selector for stage in self.stages}
        return tuple(item for selector in selectors.values() for item in selector.layer_changes().items())

    @cached_property
    def after_prefill(self) -> tuple[PlannedStage, ...]:
        """Stages at the key-value cache once the prompt was read; those at every step begin there, too."""
        return tuple(stage for stage in self.stages if isinstance(stage.site, _CACHES))

    @cached_property
    def cache_signals(self) -> tuple[Signal, ...]:
        """Signals of every decoder layer that methods at the cache require, each once."""
        return tuple(dict.fromkeys(signal for stage in self.after_prefill for signal in stage.stage.requires))

    @cached_property
    def signals(self) -> tuple[Signal, ...]:
        """Signals that the stages require, each once."""
        return tuple(dict.fromkeys(signal for stage in self.stages for signal in stage.stage.requires))

    @cached_property
    def token_signals(self) -> tuple[Signal, ...]:
        """Those of them that stages behind the tower require."""
        stages = [stage for stage in self.stages if not isinstance(stage.site, (Pixels, VisionLayer))]
        return tuple(dict.fromkeys(signal for stage in stages for signal in stage.stage.requires))

    @cached_property
    def probes(self) -> tuple[ProbeSignal, ...]:
        """Signals of a pass of the first decoder layers over the prompt, each once."""
        signals = [signal for stage in self.before_decoder for signal in stage.stage.requires]
        return tuple(dict.fromkeys(signal for signal in signals if isinstance(signal, ProbeSignal)))

    def of_pictures(self, stage: PlannedStage) -> tuple[PlannedStage, ...] | None:
        """Return the stages up to one before the language model, if the pictures alone decide what they choose.

        None where one of them reads anything else, or has modules, which may be in training.
        """
        last = self.before_decoder.index(stage)
        stages = (*self.before_features, *self.before_decoder[: last + 1])
        fixed = all(
            not stage.selector.trained
            and stage.stage.action is not Action.REPLACE
            and not isinstance(stage.selector, UpdatingSelector)
            and all(signal.reads in _OF_PICTURES and not signal.reads_regions for signal in stage.stage.requires)
            for stage in stages
        )
        return stages if fixed else None

    @property
    def reads_text(self) -> bool:
        """Whether a stage before the language model looks at the text."""
        return any(signal.reads is PromptText for stage in self.before_decoder for signal in stage.stage.requires)

    @property
    def positions(self) -> str:
        """Positions of kept tokens: "original" or "compact"."""
        return self.configs[0].positions

    @property
    def structural(self) -> str:
        """What happens to structural tokens: "keep" or "drop"."""
        return self.configs[0].structural


def tower_layer(site: Site) -> int:
    """Return the tower layer on entering which tokens leave: those that leave in the pixels enter none."""
    return site.layer if isinstance(site, VisionLayer) else 0


def shape_of(adapter: Adapter) -> ModelShape:
    """Read the sizes of a model that methods plan with."""
    modality = adapter.modalities[0]
    shape = ModelShape(
        len(adapter.text_model.layers),
        family=adapter.config.model_type,
        width=getattr(adapter.text_model.config, "hidden_size", None),
        vision_width=adapter.tower_width(modality),
    )
    try:
        layers = len(adapter.tower_attentions(modality))
        cls = "image" in adapter.modalities and adapter.why_not(ClsAttention(), "image") is None
        return replace(shape, vision_layers=layers, feature_layer=adapter.feature_layer(modality, {}), cls=cls)
    except UnsupportedModelError:  # raised again where a method reads the tower's attention
        return shape


def make_plan(configs: Sequence[CompressionConfig], adapter: Adapter) -> Plan:
    """Plan a compression on one model.

    Raises
    ------
    UnsupportedMethodError
        A method needs something that the model does not have, or cannot work at its site.
    ConfigError
        An option is wrong, or stages are not in order.
    """
    shape = shape_of(adapter)
    stages: list[PlannedStage] = []
    for config in configs:
        selector = get_selector(config.method, **config.options)
        for stage in selector.stages():  # what neither a layer number nor a site can change is said first
            _check_signals(selector, stage, adapter, settled=False)
        seen = shape
        if isinstance(config.site, VisionLayer) and config.site.layer:  # the tower as far as it has run by then
            seen = replace(shape, vision_layers=config.site.layer, feature_layer=config.site.layer - 1)
        selector = selector.resolve(seen, config.keep_ratio)
        planned = selector.stages(seen, config.keep_ratio)
        if config.site is not None:
            planned = _placed(selector, planned, config.site)
        for stage in planned:
            _check_signals(selector, stage, adapter)
            _check_site(selector, stage, adapter, shape)
            stages.append(PlannedStage(config, selector, stage))
    _check_order(stages)
    _check_changes([stage.selector for stage in stages], adapter)
    if configs[0].positions == "compact":
        resamples = any(stage.stage.action is Action.RESAMPLE for stage in stages)
        if adapter.multi_axis_positions and not resamples:
            raise ConfigError(
                f"positions='compact' has no meaning for the (t, h, w) positions of {adapter.config.model_type}, but "
                "where pictures become smaller (resize); use 'original'"
            )
        if not resamples and not any(isinstance(stage.site, BeforeDecoder) for stage in stages):
            raise ConfigError("positions='compact' renumbers before the language model, but no stage works there")
    return Plan(tuple(configs), tuple(stages), shape)


def _placed(selector: Selector, planned: tuple[Stage, ...], site: Site) -> tuple[Stage, ...]:
    """Move the one stage of a method to the site that the user names."""
    if len(planned) != 1 or not selector.sites:
        own = ", ".join(str(stage.site) for stage in planned)
        raise UnsupportedMethodError(
            f"{selector.name} cannot be placed at {str(site)!r}: it works at places of its own ({own or 'none'}); "
            "leave `at` out"
        )
    if type(site) not in selector.sites:
        kinds = ", ".join(
            f"{kind.word}:K" if kind in (DecoderLayer, VisionLayer) else kind.word for kind in selector.sites
        )
        raise UnsupportedMethodError(f"{selector.name} cannot work at {str(site)!r}; it can at: {kinds}")
    moved = selector.moved(planned[0], site)
    return (replace(moved, action=Action.EVICT) if isinstance(site, _CACHES) else moved,)


def _check_signals(selector: Selector, stage: Stage, adapter: Adapter, *, settled: bool = True) -> None:
    """Refuse signals that the model does not have; if the stage is `settled`, also sites and layers without them."""
    kind = adapter.config.model_type
    for signal in stage.requires:
        why = None
        for modality in adapter.modalities:
            if signal.wanted_of(modality):
                why = why or adapter.why_not(signal, modality)
        if settled:
            why = why or _misplaced(selector, signal, stage.site)
        tower = isinstance(stage.site, (Pixels, VisionLayer))
        if settled and not tower and signal.per_patch:
            why = f"it tells the patches of a token apart, which become one before {str(stage.site)!r}"
        if settled and tower and isinstance(signal, VisionSignal) and not tower_layer(stage.site):
            why = f"no layer of the tower has run at {str(stage.site)!r}"
        if settled and stage.action is Action.RESAMPLE and signal.reads is not TokenGrids:
            why = "the size of a picture is chosen by its grid alone"
        if why is not None:
            options = [text for needed, text in selector.instead.items() if isinstance(signal, needed)]
            instead = f"try {options[0]}, or see" if options else "see"
            raise UnsupportedMethodError(
                f"{selector.name} needs {signal.name}, which {kind} cannot give: {why}; {instead} "
                "vtc.list_methods(model) for what works on this model"
            )
        if settled and isinstance(signal, ProbeSignal) and adapter.decoder_stages_refused:
            raise UnsupportedMethodError(
                f"{selector.name} reads attention inside the decoder, which {kind} cannot tell: "
                f"{adapter.decoder_stages_refused}"
            )
        if settled and isinstance(signal, ProbeSignal) and signal.layer >= len(adapter.text_model.layers):
            raise ConfigError(
                f"{selector.name} reads decoder layer {signal.layer}; this model has layers 0 to "
                f"{len(adapter.text_model.layers) - 1}"
            )
        for modality in adapter.modalities if settled else ():
            if isinstance(signal, VisionSignal) and signal.wanted_of(modality):
                depth, feature_layer = len(adapter.tower_attentions(modality)), adapter.feature_layer(modality, {})
                if tower:  # the last layer that has run is the one before
                    depth, feature_layer = tower_layer(stage.site), tower_layer(stage.site) - 1
                signal.vision_layers(depth, feature_layer)


def _misplaced(selector: Selector, signal: Signal, site: Site) -> str | None:
    """Say why a signal of the decoder or of the text cannot be read at a site; None if it can."""
    if isinstance(selector, CacheSelector):
        here = isinstance(site, _CACHES) and signal.reads in _AT_CACHE
        return None if here else "only signals of the decoder layers are there at the caches"
    inside = isinstance(site, DecoderLayer)
    if signal.reads in (*_IN_DECODER, *_AT_CACHE) and not (inside and signal.reads in _IN_DECODER):
        return f"it is read inside the decoder, not at {str(site)!r}"
    if signal.reads is PromptText and not isinstance(site, (BeforeDecoder, DecoderLayer)):
        return f"it is read before the decoder and inside it, not at {str(site)!r}"
    if signal.reads is DecoderProbe and not isinstance(site, BeforeDecoder):
        return f"it is read before the decoder, not at {str(site)!r}"
    return None


def _check_site(selector: Selector, stage: Stage, adapter: Adapter, shape: ModelShape) -> None:
    """Refuse places where tokens cannot leave, and actions that cannot be carried out there."""
    site, kind = stage.site, adapter.config.model_type
    possible = ACTIONS[type(site)]
    if isinstance(site, CacheWhileDecoding) and not isinstance(selector, CacheSelector):
        raise UnsupportedMethodError(
            f"{selector.name} selects tokens of pictures and has no rule for steps of decoding"
        )
    if isinstance(site, CacheWhileDecoding) and selector.scope != "all":  # type: ignore[attr-defined]
        raise ConfigError(
            f"{selector.name} at {str(site)!r} keeps a budget of all entries, generated ones too: give scope='all'"
        )
    if stage.action not in possible:
        verbs = " or ".join(sorted(action.value for action in possible))
        raise UnsupportedMethodError(
            f"{selector.name} would {stage.action.value} tokens at {str(site)!r}, where they can only be acted on by: "
            f"{verbs}"
        )
    if stage.action is Action.UPDATE and not isinstance(selector, UpdatingSelector):
        raise UnsupportedMethodError(f"{selector.name} updates hidden states, but is no UpdatingSelector")
    removes = isinstance(site, (DecoderLayer, *_CACHES)) and stage.action is not Action.UPDATE
    if removes and adapter.decoder_stages_refused:
        raise UnsupportedMethodError(
            f"{selector.name} removes tokens inside the decoder, which {kind} cannot do: "
            f"{adapter.decoder_stages_refused}"
        )
    windows = LayerTypes(adapter.text_model.config).shortest is not None
    if isinstance(site, _CACHES) and (adapter.builds_masks or windows):
        raise UnsupportedMethodError(
            f"{selector.name} was placed at {str(site)!r}, but {kind} "
            + ("slides windows over its caches" if windows else "lets images see each other in both directions")
            + ", where entries cannot be evicted exactly; use 'decoder' or 'decoder:K'"
        )
    if stage.action is Action.RESAMPLE and adapter.resampling_refused:
        raise UnsupportedMethodError(
            f"{selector.name} makes pictures smaller, which {kind} cannot take: {adapter.resampling_refused}; try "
            "pool, which averages tokens, or see vtc.list_methods(model) for what works on this model"
        )
    if isinstance(site, (Pixels, VisionLayer)) and stage.action is not Action.RESAMPLE:
        for modality in adapter.modalities:
            last = adapter.feature_layer(modality, {})
            adapter.tower_blocks(modality)
            if tower_layer(site) > last:
                raise ConfigError(
                    f"{selector.name} was placed at {str(site)!r}, but the {modality} features of this model come from "
                    f"tower layer {last}; use 'vision:0' to 'vision:{last}'"
                )
            config: Any = adapter.tower(modality).config
            if stage.action is Action.MERGE and "flash" in str(config._attn_implementation):
                raise UnsupportedMethodError(no_merging_with_flash(selector.name, site))
    if isinstance(site, DecoderLayer) and site.layer >= shape.decoder_layers:
        raise ConfigError(
            f"{selector.name} works at decoder layer {site.layer}; this model has layers 1 to "
            f"{shape.decoder_layers - 1}"
        )


def no_merging_with_flash(method: str, site: Site) -> str:
    """Say why patches cannot merge under flash attention."""
    return (
        f"{method} merges patches at {str(site)!r}, which attention then has to count by their sizes, but flash "
        "attention takes no such weights; use attn_implementation='sdpa'"
    )


def _check_changes(selectors: Sequence[Selector], adapter: Adapter) -> None:
    """Refuse changes of layers that the language model does not have."""
    layers = dict(adapter.text_model.named_modules())
    for selector in selectors:
        missing = [name for name in selector.layer_changes() if name not in layers]
        if missing:
            raise ConfigError(
                f"{selector.name} brings an adapter for layers that the language model of {adapter.config.model_type} "
                f"does not have: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; train it for this model"
            )


def _check_order(stages: Sequence[PlannedStage]) -> None:
    removing = [stage for stage in stages if stage.stage.action is not Action.UPDATE]
    order = [stage.site.order for stage in removing]
    inside = [stage.site for stage in removing if isinstance(stage.site, DecoderLayer)]
    if order != sorted(order) or len(set(inside)) < len(inside):
        sites = ", ".join(str(stage.site) for stage in removing)
        raise ConfigError(
            f"stages must come in the order in which tokens meet them, one per decoder layer; got {sites}"
        )
    if any(stage.stage.action is Action.RESAMPLE for stage in stages[1:]):
        raise ConfigError("pictures are made smaller once, before any of their patches leave: give that stage first")
    at_cache = [stage.selector for stage in stages if isinstance(stage.site, _CACHES)]
    if len(at_cache) > 1 and any(isinstance(selector, CacheSelector) for selector in at_cache):
        names = " and ".join(selector.name for selector in at_cache)
        raise ConfigError(
            f"{names} cannot both work at 'cache': behind a method that chooses per layer, layers differ in what is "
            "left; give one of them"
        )
