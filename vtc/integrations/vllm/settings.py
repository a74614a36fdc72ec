"""What to compress with: from the environment, the server's processor arguments and those of a request.

All three say the same things under the same names: ``vtc_method``, ``vtc_keep_ratio`` or ``vtc_keep_tokens``,
``vtc_seed``, ``vtc_structural``, and ``vtc_NAME`` for an option of the method; in the environment ``VTC_METHOD`` and
so on, and ``VTC_OPTIONS`` with the options as a JSON object. Settings are resolved before vLLM hashes a picture, into
one text that says everything: what the hash, the number of placeholders and the choice of tokens are made from.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vtc.config import DEFAULT_METHOD, CompressionConfig
from vtc.errors import ConfigError, UnsupportedMethodError, VtcError
from vtc.integrations.arguments import PREFIX, configuration, parted
from vtc.plain import parse_json, shown

if TYPE_CHECKING:  # they bring torch
    from vtc.adapters.base import Adapter
    from vtc.core.selector import Selector
    from vtc.core.stage import Stage
    from vtc.engine.plan import PlannedStage

__all__ = [
    "RESOLVED",
    "environment_of",
    "from_environment",
    "methods",
    "parse",
    "planned",
    "resolve",
    "written",
]

RESOLVED = f"{PREFIX}resolved"
"""The argument that stands for all others once they are resolved."""

_VARIABLES = {f"VTC_{name.upper()}": name for name in ("method", "keep_ratio", "keep_tokens", "seed", "structural")}
_OPTIONS = "VTC_OPTIONS"
_BUDGET = ("keep_ratio", "keep_tokens")
_KEPT = (*_BUDGET, "seed", "structural")  # what stays where a later layer names another method


_POSITIONS = (
    "positions cannot be chosen in vLLM: models with (t, h, w) positions keep those of kept tokens, all others count "
    "positions over kept tokens only."
)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that environment variables make, without prefix; empty variables count as unset.

    Raises
    ------
    ConfigError
        A number is none, or ``VTC_OPTIONS`` is no JSON object.
    """
    found: dict[str, Any] = {}
    for variable, name in _VARIABLES.items():
        if text := environ.get(variable, "").strip():
            found[name] = text if name in ("method", "structural") else _number(variable, text)
    if text := environ.get(_OPTIONS, "").strip():
        try:
            options = parse_json(text)
        except ConfigError as error:
            raise ConfigError(f"{_OPTIONS} must be a JSON object of options of the method: {error}.") from error
        if not isinstance(options, dict):
            raise ConfigError(f"{_OPTIONS} must be a JSON object of options of the method, got {shown(options)}.")
        found |= {name: value for name, value in options.items() if name not in found}
    return found


def environment_of(config: CompressionConfig) -> dict[str, str]:
    """Return the variables that stand for a configuration; `from_environment` reads them."""
    variables = {}
    for variable, name in _VARIABLES.items():
        value = getattr(config, name)
        if value is not None and value != {"seed": 0, "structural": "keep"}.get(name):
            variables[variable] = str(value)
    if config.options:
        variables[_OPTIONS] = json.dumps(config.to_dict()["options"])
    return variables


def _number(variable: str, text: str) -> Any:
    try:
        value = parse_json(text)
    except ConfigError:
        value = text
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{variable} must be a number, got {text!r}.")
    return value


def resolve(*layers: Mapping[str, Any], adapter: Callable[[], Adapter] | None = None) -> CompressionConfig | None:
    """Make one configuration of settings without prefix, later layers winning; None if there are none at all.

    A layer that names a method takes it without the options that earlier layers gave to theirs, and a layer that gives
    a ratio or a count replaces both. Without a method it is the library's own.

    Parameters
    ----------
    layers
    adapter
        Of the model that is to carry it out; it is made if there are settings. None: any model.

    Raises
    ------
    ConfigError, UnsupportedMethodError
        The method or an option does not exist, a value is not allowed, or the method cannot run in vLLM.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        if "method" in layer:
            merged = {name: value for name, value in merged.items() if name in _KEPT}
        if any(name in layer for name in _BUDGET):
            merged = {name: value for name, value in merged.items() if name not in _BUDGET}
        merged |= layer
    if not merged:
        return None
    if "positions" in merged:
        raise ConfigError(f"{PREFIX}{_POSITIONS}")
    config = configuration({"method": DEFAULT_METHOD} | merged)
    planned(config, None if adapter is None else adapter())
    return config


def written(config: CompressionConfig) -> str:
    """Write a configuration as one text, the same for equal ones; `parse` reads it."""
    listed = {name: value for name, value in config.to_dict().items() if name != "version"}
    return json.dumps(listed, sort_keys=True)


@functools.lru_cache(maxsize=256)
def parse(text: str, adapter: Adapter | None = None) -> PlannedStage:
    """Read what `written` wrote, as a stage that can choose."""
    return planned(CompressionConfig.from_json(text), adapter)


def planned(config: CompressionConfig, adapter: Adapter | None = None) -> PlannedStage:
    """Return the one stage of a configured method, where it chooses before the language model, for one model.

    Parameters
    ----------
    config
    adapter
        Of the model; None: only what no model could change is checked, and what depends on the model is left open.

    Raises
    ------
    UnsupportedMethodError
        It needs something that is not there when vLLM encodes a picture; the message names it, and methods that work.
    ConfigError
        An option does not exist or is invalid, or compact positions are asked for.
    """
    from vtc.engine.plan import PlannedStage, make_plan
    from vtc.registry import get_selector

    if config.positions != "original":
        raise ConfigError(_POSITIONS)
    selector = get_selector(config.method, **config.options).resolve(None, config.keep_ratio)
    stage = PlannedStage(config, selector, selector.stages(None, config.keep_ratio)[0])
    lacks = _lacks(selector, selector.stages(None, config.keep_ratio))
    if lacks is None and config.at not in (None, "decoder"):
        lacks = f"at={config.at!r}: in vLLM tokens leave before the language model"
    if lacks is None and adapter is not None:
        try:
            stages = make_plan((config,), adapter).stages
        except UnsupportedMethodError as error:
            raise UnsupportedMethodError(f"{error}. Inside vLLM, use {', '.join(methods(adapter))}.") from error
        stage = stages[0]
        lacks = _lacks(stage.selector, tuple(each.stage for each in stages)) or _not_built(stage, adapter)
    if lacks is not None:
        use = ", ".join(methods(adapter))
        raise UnsupportedMethodError(f"{config.method} cannot run inside vLLM: {lacks}. Use {use}.")
    return stage


def _lacks(selector: Selector, stages: tuple[Stage, ...]) -> str | None:
    """Say in one clause what a method needs that is not there when vLLM encodes a picture; None if nothing."""
    from vtc.core.eviction import CacheSelector
    from vtc.core.observations import TokenGrids, VisionAttention, VisionHidden
    from vtc.core.sites import BeforeDecoder, Pixels, VisionLayer

    if isinstance(selector, CacheSelector):
        return "it chooses entries of key-value caches, which are vLLM's own"
    for stage in stages:
        if isinstance(stage.site, (Pixels, VisionLayer)):
            return (
                f"it works at {str(stage.site)!r}, and vLLM's towers take whole pictures: windows, borders and rotary "
                "tables follow from the size of a picture, of which no patch may be missing"
            )
        if not isinstance(stage.site, BeforeDecoder):
            return f"it works at {str(stage.site)!r}, and in vLLM tokens leave before the language model only"
        known = (TokenGrids, VisionAttention, VisionHidden)
        needed = sorted({signal.name for signal in stage.requires if signal.reads not in known})
        if needed:
            return f"it reads {', '.join(needed)}, and only the vision tower, its features and grids are known there"
    if len(stages) > 1:
        return f"it has {len(stages)} stages, and vLLM fixes the number of tokens once"
    if selector.adaptive:
        return "it decides itself how many tokens stay, and vLLM fixes their number before the picture is encoded"
    return None


def _not_built(stage: PlannedStage, adapter: Adapter) -> str | None:
    """Say which layers of the tower a method reads that vLLM does not build; None if there are none."""
    for modality in adapter.modalities:
        last, depth = adapter.feature_layer(modality, {}), len(adapter.tower_attentions(modality))
        for signal in stage.stage.requires:
            layers = signal.vision_layers(depth, last) if signal.wanted_of(modality) else ()
            if layers and max(layers) > last:
                return (
                    f"it reads {signal.name} of tower layer {max(layers)}, and vLLM builds the tower up to layer "
                    f"{last}, which makes the features"
                )
    return None


@functools.cache
def methods(adapter: Adapter | None = None) -> tuple[str, ...]:
    """Return the ids of the methods that run inside vLLM with their default options, sorted.

    Parameters
    ----------
    adapter
        Of the model that they are to run on; None: one whose tower has a [CLS] token.
    """
    from vtc.core.stage import ModelShape
    from vtc.engine.plan import make_plan
    from vtc.registry import selectors

    found = []
    for name, cls in selectors().items():
        if _lacks(cls(), cls().stages(None, None)) is not None:
            continue  # trained ones are not even made without their module
        if adapter is None:
            like_llava = ModelShape(32, vision_layers=24, feature_layer=22, cls=True)
            selector = cls().resolve(like_llava, 0.5)
            works = _lacks(selector, selector.stages(like_llava, 0.5)) is None
        else:
            try:
                plan = make_plan((CompressionConfig(name, keep_ratio=0.5),), adapter)
            except VtcError:
                continue
            stages = tuple(each.stage for each in plan.stages)
            works = not (_lacks(plan.stages[0].selector, stages) or _not_built(plan.stages[0], adapter))
        if works:
            found.append(name)
    return tuple(found)


def split(arguments: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide processor arguments into settings without prefix and the arguments of others."""
    return parted(arguments or {})
