"""The verbs: compress a model, look at what was kept, pause, undo."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from vtc.config import DEFAULT_METHOD, CompressionConfig
from vtc.core.sites import Site
from vtc.engine.install import adapter_for, engine_of, find_engine, install, paused, uninstall
from vtc.engine.memory import EncoderMemory
from vtc.engine.plan import make_plan
from vtc.errors import ConfigError, UnsupportedMethodError
from vtc.notation import parse_stages
from vtc.registry import adapters, selectors
from vtc.report.report import Report

Model = TypeVar("Model", bound=nn.Module)
Method = str | CompressionConfig | Sequence[CompressionConfig]


def compress(
    model: Model,
    method: Method = DEFAULT_METHOD,
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    positions: str = "original",
    structural: str = "keep",
    seed: int = 0,
    at: str | Site | None = None,
    **options: Any,
) -> Model:
    """Compress the visual tokens of `model`, in place: the same object is returned.

    From then on every call that brings images or videos keeps a part of their tokens; text is never touched, but for
    entries of caches where ``scope="all"`` says so. Calling again replaces the configuration. Any number of threads may
    run the model, and `compress` and `restore` refuse to change it while one does.

    Parameters
    ----------
    model : PreTrainedModel
        A transformers vision-language model, also one wrapped by PEFT, `torch.compile`, DDP, FSDP or accelerate;
        `supported_models()` lists the families.
    method : str, CompressionConfig, or sequence of CompressionConfig
        `list_methods()` lists the names. Several configurations are applied one after the other, and later ratios are
        relative to what is left by then. They can be written in one line, budgets included:
        "divprune@vision:8=0.5+vtc=0.25" (see `vtc.notation`).
    keep_ratio : float, optional
        Fraction of the tokens of each image or video to keep, in (0, 1].
    keep_tokens : int, optional
        Tokens to keep of each image or video; exactly one of the two.
    positions : {"original", "compact"}
        Kept tokens stay where they stood in the full prompt, or are counted anew (for parity with papers that do so,
        and behind "resize"). A line of stages may say it, too: "resize@pixels=0.5+vtc=0.5 compact".
    structural : {"keep", "drop"}
        What happens to newline and separator tokens, which no method scores.
    seed : int
        For methods that draw.
    at : str or Site, optional
        Where tokens leave: "pixels" or "vision:K" (before the vision tower, or on entering its layer K), "decoder"
        (before the language model), "decoder:K" (on entering its layer K), "cache" (after the prefill) or
        "cache:decoding" (after it and after every step); for methods of one place, as far as they can work there; by
        default where the method says. `vtc.core.sites` lists all places.
    **options
        Options of the method.

    Raises
    ------
    UnsupportedModelError
        The family is not known, or the model is set up in a way that cannot be compressed exactly.
    UnsupportedMethodError
        The method is not known, or needs something that this model does not have.
    ConfigError
        An argument is wrong.
    StateError
        Calls of the model are running, or a part of it is compressed by itself. Whatever is raised, the model is as it
        was.
    """
    shared = {
        "keep_ratio": keep_ratio,
        "keep_tokens": keep_tokens,
        "positions": positions,
        "structural": structural,
        "seed": seed,
        "at": at,
    }
    install(model, _configs(method, shared, options))
    return model


def restore(model: Model) -> Model:
    """Take everything away that `compress` installed; does nothing to a model that is not compressed.

    Raises
    ------
    StateError
        Calls of the model are running.
    """
    uninstall(model)
    return model


@contextmanager
def compressed(model: Model, method: Method = DEFAULT_METHOD, **arguments: Any) -> Iterator[Model]:
    """Compress for the length of a `with` block, then put an earlier configuration back."""
    with paused(model):
        compress(model, method, **arguments)
        yield model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Keep all tokens for the length of a `with` block, without uninstalling anything.

    As with `torch.no_grad`, this holds for the thread or task that is in the block.
    """
    with engine_of(model).calls.pause():
        yield model


def is_compressed(model: nn.Module) -> bool:
    """Tell whether `compress` is in force on this model."""
    return find_engine(model) is not None


def report(model: nn.Module) -> Report:
    """Report what the last prompt kept, and what that saves.

    The last prompt of the thread or task that asks; if it has read none, as where a streamer's thread generates, the
    last of the model. Turns that only add text to a conversation do not count as a prompt, and neither do calls that
    others make while they run, such as the unconditional pass of classifier-free guidance.

    Raises
    ------
    StateError
        The model is not compressed, or has not been run since; or several threads ran it at the same time, none of
        them the one that asks.
    """
    return engine_of(model).report()


@contextmanager
def reports(model: nn.Module) -> Iterator[list[Report]]:
    """Collect a report of every call made in a `with` block, in the order in which the calls end.

    Calls of this thread or task count, and those of tasks and threads that run in a copy of its context, as tasks and
    the threads of `asyncio.to_thread` do; other threads: ``Thread(target=contextvars.copy_context().run, args=...)``.

    Raises
    ------
    StateError
        The model is not compressed.
    """
    engine = engine_of(model)
    found: list[Report] = []
    with engine.calls.collecting(lambda prompt: found.append(engine.report(prompt))):
        yield found


@contextmanager
def remember(model: Model, memory: EncoderMemory) -> Iterator[Model]:
    """Encode the images and videos of one prompt once: the results stay in `memory`, and what is there is not repeated.

    The memory may pass from one compression of the model to the next, for other methods, budgets or questions about
    the same pictures. What leaves a tower that stages make pictures smaller for, or work inside, serves later calls
    with these very stages alone. Choices before the language model are kept likewise, where they, and those before
    them, are made of the pictures and nothing else. Stages with trained modules, which may be in training, run anew.
    With ``EncoderMemory(rows=Q)`` the prompt has Q rows that show the same pictures, which are encoded once as well.

    Raises
    ------
    StateError
        The model is not compressed.
    InputError
        While it runs: the rows do not show the same pictures.
    """
    with engine_of(model).remember(memory):
        yield model


def list_methods(model: nn.Module | str | None = None) -> dict[str, str]:
    """List methods with their sources; with a model, methods that it cannot run say why instead.

    Parameters
    ----------
    model : PreTrainedModel or str, optional
        Instead of a model a pattern of names, with the wildcards of a shell: ``list_methods("*zip*")``.

    Raises
    ------
    UnsupportedMethodError
        No name matches.
    """
    methods = {name: cls.paper for name, cls in selectors(model if isinstance(model, str) else "*").items()}
    if model is None or isinstance(model, str):
        return methods
    adapter = adapter_for(model)
    for name in methods:
        try:
            make_plan([CompressionConfig(method=name, keep_ratio=0.5)], adapter)
        except (UnsupportedMethodError, ConfigError) as error:
            methods[name] = f"not on this model: {error}"
    return methods


def supported_models() -> list[str]:
    """List `config.model_type` of every family that has an adapter."""
    return sorted(adapters())


def _configs(method: Method, shared: dict[str, Any], options: dict[str, Any]) -> list[CompressionConfig]:
    if isinstance(method, str) and "=" in method:
        if given := [name for name in ("keep_ratio", "keep_tokens", "at") if shared[name] is not None] + list(options):
            raise ConfigError(f"{', '.join(given)} given beside {method!r}, which says it for each stage")
        more = {name: shared[name] for name in ("structural", "seed")}
        if shared["positions"] != "original":  # else as the line says
            more["positions"] = shared["positions"]
        return [dataclasses.replace(config, **more) for config in parse_stages(method)]
    if isinstance(method, str):
        return [CompressionConfig(method=method, options=options, **shared)]
    configs = [method] if isinstance(method, CompressionConfig) else list(method)
    defaults = {"positions": "original", "structural": "keep", "seed": 0}  # of the others: None
    given = [name for name, value in {**shared, **options}.items() if value != defaults.get(name)]
    if given:
        raise ConfigError(f"{', '.join(given)} given beside a CompressionConfig; put them into the configuration")
    if not configs or not all(isinstance(config, CompressionConfig) for config in configs):
        raise ConfigError("method must be a name, a CompressionConfig, or a non-empty sequence of CompressionConfig")
    for name in ("positions", "structural"):
        if len({getattr(config, name) for config in configs}) > 1:
            raise ConfigError(f"composed configurations must agree on {name!r}")
    return configs
