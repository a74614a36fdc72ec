"""The verbs: compress a model, look at what was kept, pause, undo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from vtc.config import CompressionConfig
from vtc.engine.engine import Engine
from vtc.engine.plan import PlannedStage
from vtc.errors import ConfigError, StateError, UnsupportedMethodError, UnsupportedModelError
from vtc.registry import adapters, get_adapter, get_selector, selectors
from vtc.report.report import Report

Model = TypeVar("Model", bound=nn.Module)
Method = str | CompressionConfig | Sequence[CompressionConfig]

_ATTRIBUTE = "_vtc_engine"


def compress(
    model: Model,
    method: Method = "divprune",
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    positions: str = "original",
    structural: str = "keep",
    seed: int = 0,
    **options: Any,
) -> Model:
    """Compress the visual tokens of `model`, in place: the same object is returned.

    From then on every call that brings images or videos keeps a part of their tokens; text is never touched. Calling
    again replaces the configuration.

    Parameters
    ----------
    model : PreTrainedModel
        A transformers vision-language model, also one wrapped by PEFT; `supported_models()` lists the families.
    method : str, CompressionConfig, or sequence of CompressionConfig
        `list_methods()` lists the names. Several configurations are applied one after the other, and later ratios are
        relative to what is left by then.
    keep_ratio : float, optional
        Fraction of the tokens of each image or video to keep, in (0, 1].
    keep_tokens : int, optional
        Tokens to keep of each image or video; exactly one of the two.
    positions : {"original", "compact"}
        Kept tokens stay where they stood in the full prompt, or are counted anew (for parity with papers that do so).
    structural : {"keep", "drop"}
        What happens to newline and separator tokens, which no method scores.
    seed : int
        For methods that draw.
    **options
        Options of the method.

    Raises
    ------
    UnsupportedModelError
        The family is not known, or the model is set up in a way that cannot be compressed exactly.
    UnsupportedMethodError
        The method is not known, or needs something that this model does not have.
    ConfigError
        An argument is wrong. Whatever is raised, the model is as it was.
    """
    shared = {
        "keep_ratio": keep_ratio,
        "keep_tokens": keep_tokens,
        "positions": positions,
        "structural": structural,
        "seed": seed,
    }
    configs = _configs(method, shared, options)
    target = _unwrap(model)
    adapter = get_adapter(str(target.config.model_type))(target)
    stages = _plan(configs, adapter)
    engine = Engine(target, adapter, configs, stages)
    before: Engine | None = getattr(target, _ATTRIBUTE, None)
    if before is not None:
        before.uninstall()
    try:
        engine.install()
    except BaseException:
        if before is not None:
            before.install()
        raise
    setattr(target, _ATTRIBUTE, engine)
    return model


def restore(model: Model) -> Model:
    """Take everything away that `compress` installed; does nothing to a model that is not compressed."""
    target = _unwrap(model)
    engine: Engine | None = target.__dict__.pop(_ATTRIBUTE, None)
    if engine is not None:
        engine.uninstall()
    return model


@contextmanager
def compressed(model: Model, method: Method = "divprune", **arguments: Any) -> Iterator[Model]:
    """`compress` for the length of a `with` block; an earlier configuration comes back afterwards."""
    before = getattr(_unwrap(model), _ATTRIBUTE, None)
    compress(model, method, **arguments)
    try:
        yield model
    finally:
        restore(model)
        if before is not None:
            before.install()
            setattr(_unwrap(model), _ATTRIBUTE, before)


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Keep all tokens for the length of a `with` block, without uninstalling anything."""
    engine = _engine(model)
    before, engine.enabled = engine.enabled, False
    try:
        yield model
    finally:
        engine.enabled = before


def is_compressed(model: nn.Module) -> bool:
    """Whether `compress` is in force on this model."""
    return _ATTRIBUTE in _unwrap(model).__dict__


def report(model: nn.Module) -> Report:
    """What the last prompt kept, and what that saves.

    Turns that only add text to a conversation do not count as a prompt.

    Raises
    ------
    StateError
        The model is not compressed, or has not been run since.
    """
    return _engine(model).report()


def list_methods(model: nn.Module | None = None) -> dict[str, str]:
    """All methods with where they come from; with a model, those it cannot run say why instead."""
    methods = {name: cls.paper for name, cls in selectors().items()}
    if model is None:
        return methods
    target = _unwrap(model)
    adapter = get_adapter(str(target.config.model_type))(target)
    for name in methods:
        try:
            _plan([CompressionConfig(method=name, keep_ratio=0.5)], adapter)
        except (UnsupportedMethodError, ConfigError) as error:
            methods[name] = f"not on this model: {error}"
    return methods


def supported_models() -> list[str]:
    """`config.model_type` of every family that has an adapter."""
    return sorted(adapters())


def _configs(method: Method, shared: dict[str, Any], options: dict[str, Any]) -> list[CompressionConfig]:
    if isinstance(method, str):
        return [CompressionConfig(method=method, options=options, **shared)]
    configs = [method] if isinstance(method, CompressionConfig) else list(method)
    defaults = {"keep_ratio": None, "keep_tokens": None, "positions": "original", "structural": "keep", "seed": 0}
    given = [name for name, value in {**shared, **options}.items() if value != defaults.get(name)]
    if given:
        raise ConfigError(f"{', '.join(given)} given beside a CompressionConfig; put them into the configuration")
    if not configs or not all(isinstance(config, CompressionConfig) for config in configs):
        raise ConfigError("method must be a name, a CompressionConfig, or a non-empty sequence of CompressionConfig")
    for name in ("positions", "structural"):
        if len({getattr(config, name) for config in configs}) > 1:
            raise ConfigError(f"composed configurations must agree on {name!r}")
    return configs


def _plan(configs: Sequence[CompressionConfig], adapter: Any) -> list[PlannedStage]:
    """The stages in the order in which tokens meet them, each checked against what the model has."""
    stages: list[PlannedStage] = []
    depth = len(adapter.text_model.layers)
    kind = adapter.config.model_type
    for config in configs:
        selector = get_selector(config.method, **config.options).resolve(depth, config.keep_ratio)
        planned = selector.plan(depth, config.keep_ratio)
        for stage in planned:
            for need in sorted(stage.requires - adapter.supplies()):
                instead = f"try {selector.instead[need]}, or see" if need in selector.instead else "see"
                raise UnsupportedMethodError(
                    f"{config.method} needs {need.value}, which {kind} cannot give: {adapter.why_not(need)}; "
                    f"{instead} vtc.list_methods(model) for what works on this model"
                )
            if stage.layer is not None:
                if adapter.decoder_stages_refused:
                    raise UnsupportedMethodError(
                        f"{config.method} removes tokens inside the decoder, which {kind} cannot do: "
                        f"{adapter.decoder_stages_refused}"
                    )
                if not 1 <= stage.layer < depth:
                    raise ConfigError(
                        f"{config.method} prunes at decoder layer {stage.layer}; this model has layers 1 to {depth - 1}"
                    )
            stages.append(PlannedStage(config, selector, stage.layer, stage.requires, stage.keep, stage.images_only))
        for modality in adapter.modalities:
            if any(stage.layer is None and stage.requires for stage in planned):
                layers = len(adapter.tower_attentions(modality))
                selector.vision_layers(layers, adapter.feature_layer(modality, {}))
    order = [-1 if stage.layer is None else stage.layer for stage in stages]
    inside = [layer for layer in order if layer >= 0]
    if order != sorted(order) or len(set(inside)) < len(inside):
        raise ConfigError(
            f"stages must come in the order in which tokens meet them, one per decoder layer; got {order}"
        )
    if configs[0].positions == "compact":
        if adapter.multi_axis_positions:
            raise ConfigError(
                f"positions='compact' has no meaning for the (t, h, w) positions of {kind}; use 'original'"
            )
        if all(stage.layer is not None for stage in stages):
            raise ConfigError("positions='compact' renumbers before the language model, but no stage works there")
    return stages


def _unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(inner, "config") or not hasattr(inner, "get_decoder"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model with a language model inside")
    return inner


def _engine(model: nn.Module) -> Engine:
    engine = getattr(_unwrap(model), _ATTRIBUTE, None)
    if engine is None:
        raise StateError("the model is not compressed; call vtc.compress(model, ...) first")
    return engine
