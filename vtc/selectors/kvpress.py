"""Presses of NVIDIA's kvpress: their scores, or what they keep, at the key-value caches of vision-language models."""

from __future__ import annotations

import functools
import inspect
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import CompressionConfig
from ..core.eviction import CacheContext, CacheSelector
from ..core.observations import DecoderCall, Observation
from ..core.signals import Signal
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError, InputError, UnsupportedMethodError, VtcError
from ..plain import plain, shown
from ..registry import register_selector

__all__ = ["KvPressSelector", "PressChoice", "press", "why_not"]

_LENDING = threading.Lock()
"""Held while a press runs: what is lent to a module is seen by all threads, and presses keep state."""

_INSTALL = 'pip install "vtc[kvpress]" && pip install --no-deps kvpress'


@dataclass(frozen=True)
class PressChoice(Signal):
    """What a press says of each entry of a layer, (heads, N): its scores, or 1 for what it keeps and 0 for the rest.

    Parameters
    ----------
    press
        The press as JSON: a mapping with its class as `name`, and its options.
    by
        "score" or "compress": which of its methods is asked.
    """

    name: ClassVar[str] = "press_choice"
    reads: ClassVar[type[Observation]] = DecoderCall
    axes: ClassVar[tuple[str, ...]] = ("heads", "N")

    press: str = '{"name": "SnapKVPress"}'
    by: str = "score"

    def compute(self, raw: DecoderCall) -> Tensor:
        """(B, T, Hkv), row by row without padding, as if each row were a prompt of its own."""
        return raw.per_row(self._row)

    def present(self, values: Tensor) -> Tensor:
        """(N, Hkv) to (Hkv, N)."""
        return values.T

    def _row(self, raw: DecoderCall) -> Tensor:
        made = _made(self.press)
        kwargs = {
            "hidden_states": raw.hidden,
            "position_embeddings": raw.tables,
            "attention_mask": None,
            "position_ids": torch.arange(raw.hidden.shape[1], device=raw.hidden.device)[None],
        }
        arguments = raw.module, raw.hidden, raw.keys, raw.values, raw.attention, kwargs
        try:
            with _LENDING, _lent(raw):
                made.post_init_from_model(raw.model)
                if self.by == "score":
                    return made.score(*arguments)[0].float().T
                before = _hashes(raw.keys, raw.values)  # a press may write into what it is given
                keys, values = made.compress(*arguments)
                masked = raw.module.__dict__.pop("masked_key_indices", None)
        except VtcError:
            raise
        except Exception as error:
            raise UnsupportedMethodError(f"{type(made).__name__} failed on this model: {error!r}") from error
        if masked is not None:
            raise UnsupportedMethodError(
                f"{type(made).__name__} masks other numbers of entries in each head instead of removing equally many"
            )
        if keys.shape[1::2] != raw.keys.shape[1::2] or values.shape[1::2] != raw.values.shape[1::2]:
            raise _changed(type(made).__name__)
        return _traced(type(made).__name__, before, _hashes(keys, values)).float().T


@register_selector
@dataclass(frozen=True)
class KvPressSelector(CacheSelector):
    """Keep the cache entries that a press of kvpress would keep.

    The press is asked layer by layer, for each row without padding, with the keys and values of the prompt as the cache
    has them. With ``scope="visual"`` its `score` ranks the entries of visual tokens, and `budgets` says how many stay;
    that needs a press that only ranks. With ``scope="all"`` its own `compress` decides; which entries it kept is traced
    by comparing them, and the press sets the numbers. `vtc.press` makes a configuration of a press object.

    Not kvpress's own hook: that one knows neither vision-language models nor transformers from 5.3 on. Refused by name
    are presses that work through hooks of their own on the model (for several passes, or while decoding), change keys
    or values, or keep other numbers in each head. What a press misses is lent for its call: `rotary_emb` of the
    attention module, and `head_dim` in the configuration.

    Parameters
    ----------
    scope, budgets
        As in `CacheSelector`; with ``scope="all"`` the budgets are the press's own.
    press
        Class of the press, or a mapping with its class as `name`, and its options; options that are presses are such
        mappings again.

    Raises
    ------
    ConfigError
        An option is invalid, or kvpress is not installed.
    UnsupportedMethodError
        The press is one of those that are refused.

    References
    ----------
    https://github.com/NVIDIA/kvpress, version 0.5.5.
    """

    name: ClassVar[str] = "kvpress"
    paper: ClassVar[str] = "presses of NVIDIA kvpress"
    cost: ClassVar[str] = "the press's"

    press: Any = "SnapKVPress"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.spec()

    def spec(self) -> str:
        """Return the press as JSON."""
        press = {"name": self.press} if isinstance(self.press, str) else self.press
        if not isinstance(press, Mapping) or not isinstance(press.get("name"), str):
            raise ConfigError(f"kvpress: press is a class of kvpress or a mapping with its `name`, got {shown(press)}.")
        return json.dumps(press, default=lambda value: dict(value) if isinstance(value, Mapping) else list(value))

    def reads(self) -> tuple[Signal, ...]:
        """Return the press's scores, or what it keeps."""
        return (PressChoice(self.spec(), "compress" if self.scope == "all" else "score"),)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, after the prefill; for a model, the press is made here first."""
        if shape is not None:
            made = _build(json.loads(self.spec()))  # one that has run may say another ratio than it was given
            reason = why_not(made)
            if reason is None and self.scope == "visual" and not _ranks(made):
                reason = 'it does not only rank entries, so it cannot leave those of text alone; give scope="all"'
            if reason is not None:
                raise UnsupportedMethodError(f"kvpress: {type(made).__name__} cannot be used: {reason}")
            ratio = _ratio(made)
            if self.scope == "all" and ratio is not None and abs(1 - ratio - (keep_ratio or 0)) > 1e-6:
                raise ConfigError(f"kvpress: the press keeps {1 - ratio:g}; give keep_ratio={1 - ratio:g} as well")
        return super().stages(shape, keep_ratio)

    def score(self, ctx: CacheContext) -> Tensor:
        """(heads, N) scores of the press, or 1 and 0."""
        return ctx[PressChoice].float()

    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Return what the press keeps itself, or what the budgets say."""
        if self.scope == "visual":
            return super().share(contexts)
        counts = [ctx[PressChoice].sum(dim=1).long().tolist() for ctx in contexts]
        for ctx, heads in zip(contexts, counts, strict=True):
            if len(set(heads)) > 1:
                raise InputError(f"kvpress: layer {ctx.layer} keeps {heads} entries in its heads: not equally many")
        return [heads[0] if heads else 0 for heads in counts]


def press(press: Any, *, scope: str = "visual", **arguments: Any) -> CompressionConfig:
    """Make a configuration of a press of kvpress: ``vtc.compress(model, vtc.press(SnapKVPress(0.5)))``.

    Parameters
    ----------
    press : kvpress.BasePress
        Its options are written down, so that the configuration survives JSON.
    scope : {"visual", "all"}
        Whether the press's scores rank the entries of visual tokens, or the press decides about the whole prompt.
    **arguments
        Of `CompressionConfig`, such as `seed`; and the option `budgets`.

    Returns
    -------
    CompressionConfig
        Keeping what the press keeps: 1 minus its compression ratio, or everything if it has none and decides itself.

    Raises
    ------
    ConfigError
        It is no press, or an option of it cannot be written down.
    """
    options = {"press": _described(press), "scope": scope}
    if "budgets" in arguments:
        options["budgets"] = arguments.pop("budgets")
    keep = round(1 - float(_ratio(press) or 0.0), 12)
    return CompressionConfig("kvpress", keep_ratio=keep, options=options, **arguments)


def why_not(made: Any) -> str | None:
    """Say why a press cannot be used whatever the model; None if it can be tried."""
    base = _kvpress().BasePress
    for part in _presses_in(made):
        for method, what in (("forward_hook", "in a hook of its own"), ("__call__", "in a context of its own")):
            if getattr(type(part), method) is not getattr(base, method):
                return f"it works {what} on the whole model"
    return None


def _ratio(made: Any) -> float | None:
    """Return the compression ratio of a press; None if it has none, or knows it only when it has run."""
    try:
        return getattr(made, "compression_ratio", None)
    except (AssertionError, ValueError):
        return None


def _ranks(made: Any) -> bool:
    """Tell whether a press ranks entries and leaves the rest to kvpress."""
    scorer = _kvpress().ScorerPress
    return isinstance(made, scorer) and type(made).compress is scorer.compress


def _presses_in(made: Any) -> Iterator[Any]:
    """Yield a press and those among its options."""
    yield made
    for value in vars(made).values():
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(inner, _kvpress().BasePress):
                yield from _presses_in(inner)


def _described(made: Any) -> dict[str, Any]:
    """Write a press down as a mapping."""
    kvpress = _kvpress()
    if not isinstance(made, kvpress.BasePress):
        raise ConfigError(f"vtc.press takes a press of kvpress, got {shown(made)}.")
    found: dict[str, Any] = {"name": type(made).__name__}
    for name in inspect.signature(type(made)).parameters:
        value = getattr(made, name, None)
        if isinstance(value, kvpress.BasePress):
            found[name] = _described(value)
        elif isinstance(value, (list, tuple)) and any(isinstance(part, kvpress.BasePress) for part in value):
            found[name] = [_described(part) for part in value]
        elif value is not None and not name.startswith("_"):
            try:
                found[name] = plain(value, name)
            except ConfigError as error:
                raise ConfigError(f"{type(made).__name__} cannot be written down: {error}") from error
    return found


@functools.lru_cache(maxsize=16)
def _made(spec: str) -> Any:
    """Make a press of its description.

    Raises
    ------
    ConfigError
        kvpress is not installed, has no such press, or the press does not take its options.
    """
    return _build(json.loads(spec))


def _build(description: Mapping[str, Any]) -> Any:
    kvpress, name = _kvpress(), str(description.get("name"))
    cls = getattr(kvpress, name, None)
    if not isinstance(cls, type) or not issubclass(cls, kvpress.BasePress):
        known = ", ".join(sorted(n for n in dir(kvpress) if n.endswith("Press")))
        raise ConfigError(f"kvpress has no press {name!r}; it has {known}.")

    def value_of(value: Any) -> Any:
        if isinstance(value, Mapping) and "name" in value:
            return _build(value)
        return [value_of(part) for part in value] if isinstance(value, list) else value

    try:
        return cls(**{key: value_of(value) for key, value in description.items() if key != "name"})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"kvpress: {name} does not take the options {shown(dict(description))}: {error}") from error


def _kvpress() -> Any:
    try:
        import kvpress
    except ImportError as error:
        raise ConfigError(f"The method kvpress needs the package kvpress ({error}): {_INSTALL}") from error
    return kvpress


@contextmanager
def _lent(raw: DecoderCall) -> Iterator[None]:
    """Lend a press what it looks for in vain on some models, for the length of its call."""
    given: list[tuple[Any, str]] = []
    config = raw.module.config
    for owner, name, value in (
        (raw.module, "rotary_emb", raw.rotary),
        (config, "head_dim", raw.keys.shape[-1]),
    ):
        if getattr(owner, name, None) is None:
            given.append((owner, name))
            owner.__dict__[name] = value
    try:
        yield
    finally:
        for owner, name in given:
            owner.__dict__.pop(name, None)


def _traced(name: str, before: Tensor, after: Tensor) -> Tensor:
    """(Hkv, n) bool: which entries (Hkv, n), given by their hashes, are among those (Hkv, k) that a press returned.

    Raises
    ------
    UnsupportedMethodError
        Some of those are not among the entries: the press has changed them.
    """
    ordered, order = before.sort(dim=1)
    places = torch.searchsorted(ordered, after).clamp(max=before.shape[1] - 1)
    if not torch.equal(ordered.gather(1, places), after):
        raise _changed(name)
    found = torch.zeros(before.shape, dtype=torch.bool, device=before.device)
    found.scatter_(1, order.gather(1, places), True)
    if bool((found.sum(dim=1) != after.shape[1]).any()):
        raise UnsupportedMethodError(f"{name} returns entries twice, or there are entries that are equal")
    return found


def _changed(name: str) -> UnsupportedMethodError:
    return UnsupportedMethodError(f"{name} changes keys or values, instead of choosing among them")


def _hashes(keys: Tensor, values: Tensor) -> Tensor:
    """(Hkv, n) long: a hash of the bits of every entry, of keys and values (1, Hkv, n, d)."""
    x = torch.cat([keys, values], dim=-1)[0].detach()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    words = x.contiguous().view(bits).long()
    odd = torch.randint(-(2**62), 2**62, words.shape[-1:], generator=torch.Generator().manual_seed(0))
    return (words * (2 * odd + 1).to(words.device)).sum(dim=-1)
