"""Inside the language model: on entering a layer its stage chooses, and hidden states and rotary tables become shorter.

A stage at layer k may read the attention of layer k - 1, which is recorded while that layer runs. One that merges gives
the tokens that stay weighted sums of hidden states; their positions stay. Layers behind a stage get masks and rotary
tables of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vtc import kernels
from vtc.core.observations import (
    DecoderAttention,
    DecoderCall,
    DecoderHidden,
    DecoderUpdate,
    EnteredAttention,
    Observation,
)
from vtc.core.selection import Selection
from vtc.core.signals import Signal
from vtc.core.sites import CacheAfterPrefill, DecoderLayer
from vtc.engine.ahead import look_ahead
from vtc.engine.before_decoder import require_whole_prompt
from vtc.engine.cache import cache_in
from vtc.engine.choose import choose
from vtc.engine.compression import Compression
from vtc.engine.decoding import record_step
from vtc.engine.entries import keys_and_values
from vtc.engine.plan import PlannedStage
from vtc.engine.prompt import Prompt
from vtc.engine.recorder import UNSEEN, Recording, record_once
from vtc.engine.state import ForwardState, PrebuiltMasks
from vtc.engine.updating import update_hidden
from vtc.errors import InputError, StateError

__all__ = ["enter_layer", "enter_prebuilt", "see_call", "see_update"]

_CACHE = CacheAfterPrefill()

_TABLES = "position_embeddings"


def enter_layer(
    compression: Compression, forward: ForwardState, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Drop tokens on entering decoder layer `layer`, and correct what the layer is called with.

    Returns
    -------
    The arguments of the layer; None if they stay as they are.
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    if forward.cache is None:
        forward.cache = cache_in(kwargs)
    if forward.prompt is not None:
        stage, following = (compression.plan.in_decoder.get(place) for place in (layer, layer + 1))
        if stage is not None:
            hidden = _prune(compression, stage, layer, forward, forward.prompt, hidden, kwargs.get(_TABLES))
        if following is not None and forward.prompt.decided(following.site):
            following = None
        at_cache = () if forward.prompt.decided(_CACHE) else compression.plan.cache_signals
        if at_cache:
            _begin_layer(at_cache, layer, forward, hidden)
        if following is not None or at_cache:
            _record(compression, following, at_cache, layer, forward)
    elif forward.history.decoding is not None:  # a layer without attention has none to record
        record_step(forward, layer, compression.adapter.decoder_attention(layer))
    updates = compression.plan.updates.get(layer) if forward.memories else None
    if updates is not None:  # where checkpointing runs a layer again, tokens have left behind it
        visual = None if forward.prompt is None else forward.visual()
        source_index, visual = forward.updated.setdefault(layer, (forward.source_index, visual))
        hidden = update_hidden(updates, forward.memories, layer, hidden, source_index, visual)
    if not forward.touched:
        return None if updates is None else _entering(args, kwargs, hidden)
    kwargs = {**kwargs, "position_ids": None}  # flash attention would read gaps as packed sequences
    if forward.layer_plans:
        kwargs[_TABLES] = forward.rotary(layer, kwargs[_TABLES])
    if forward.needs_mask(layer) or compression.adapter.builds_masks:
        kwargs["attention_mask"] = forward.mask(layer, hidden)
    return _entering(args, kwargs, hidden)


def enter_prebuilt(
    compression: Compression, prebuilt: PrebuiltMasks, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Do as `enter_layer` in a decode step for which masks were built ahead."""
    updates, mask = compression.plan.updates.get(layer), prebuilt.masks[layer]
    if mask is not None:
        kwargs = {**kwargs, "attention_mask": mask}
    if updates is not None and prebuilt.forward is not None:
        hidden, forward = args[0] if args else kwargs["hidden_states"], prebuilt.forward
        hidden = update_hidden(updates, forward.memories, layer, hidden, forward.source_index, None)
        return _entering(args, kwargs, hidden)
    return None if mask is None else (args, kwargs)


def _entering(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _prune(
    compression: Compression,
    stage: PlannedStage,
    layer: int,
    forward: ForwardState,
    prompt: Prompt,
    hidden: torch.Tensor,
    tables: Any,
) -> torch.Tensor:
    """Return hidden states (B, T, D) without the tokens that the stage on entering `layer` drops or merges away.

    `tables` are the rotary tables of the tokens that came in.
    """
    site = DecoderLayer(layer)
    if layer in forward.layer_merges:  # gradient checkpointing runs a layer again
        hidden = _merged(forward.layer_merges[layer], hidden)
        known = dict(forward.layer_plans).get(layer)
        return hidden if known is None else known.take(hidden)
    if not prompt.decided(site):
        require_whole_prompt(forward, stage)
        values = _values(compression, stage, layer, forward, hidden, tables)
        for segment in prompt.segments:
            row = forward.first_row(segment.row)
            places = forward.find(row, segment.columns[segment.kept])
            extra = {s: value[row][places] if s.per_token else value[row] for s, value in values.items()}
            extra |= segment.text_signals
            prompt.spend(stage.site, choose(stage, segment, extra, structural=compression.plan.structural))
        prompt.decide(site)
    forward.layer_merges[layer] = _merges(forward, prompt, site)
    hidden = _merged(forward.layer_merges[layer], hidden)
    keep = forward.keeping(prompt.keep_at(site))
    if torch.equal(keep, forward.valid):
        return hidden
    hidden = forward.pack_at(layer, keep, hidden)
    forward.write_record(compression.owner, forward.shift)
    return hidden


def _merges(forward: ForwardState, prompt: Prompt, site: DecoderLayer) -> list[tuple[int, torch.Tensor, Selection]]:
    """Find the current tokens that the stage at `site` merges: see `ForwardState.layer_merges`."""
    found = []
    repeats = len(forward.source_index) // prompt.rows
    for segment in prompt.segments:
        entering, selection = segment.entering(site)
        if selection.assign is None:
            continue
        for row in range(segment.row * repeats, (segment.row + 1) * repeats):
            found.append((row, forward.find(row, segment.columns[entering]), selection))
    return found


def _merged(merges: Sequence[tuple[int, torch.Tensor, Selection]], hidden: torch.Tensor) -> torch.Tensor:
    """Return hidden states (B, T, D) with merged tokens in the places of those that stay."""
    if not merges:
        return hidden
    merged = hidden.clone()
    for row, places, selection in merges:
        merged[row, places[selection.keep.to(places.device)]] = selection.merge(hidden[row, places])
    return merged


def _values(
    compression: Compression,
    stage: PlannedStage,
    layer: int,
    forward: ForwardState,
    hidden: torch.Tensor,
    tables: Any,
) -> dict[Signal, torch.Tensor]:
    """Compute the decoder signals that a stage on entering `layer` requires, for all current tokens.

    Raises
    ------
    StateError
        The layer before ran without its attention being seen, or this one cannot be looked into.
    """
    values = forward.records.pop(layer - 1, {})
    for signal in stage.stage.requires:
        if signal.reads is DecoderAttention and signal not in values:
            raise StateError(f"decoder layer {layer - 1} ran without its attention being seen: {UNSEEN}")
        if signal.reads is DecoderHidden:
            values[signal] = signal.compute(DecoderHidden(hidden.detach()))
    ahead = [signal for signal in stage.stage.requires if signal.reads is EnteredAttention]
    if ahead:
        observed = _observed(layer, forward, EnteredAttention)

        def see(*seen: Any) -> None:
            values.update(_computed(ahead, observed(*seen), stage.selector.name))

        _look_ahead(compression, layer, forward, hidden, tables, see)
    return values


def see_update(forward: ForwardState, signals: Sequence[Signal], layer: int, after: torch.Tensor) -> None:
    """Compute the signals of what the attention of a layer did to the hidden states, `after` (B, T, D) it was added."""
    before = forward.entering.pop(layer, None)
    if before is not None:
        rows = forward.first_rows()
        raw = DecoderUpdate(before[rows], after.detach()[rows], forward.prompt_columns()[rows] >= 0)
        values = forward.entry_values.setdefault(layer, {})
        values |= {signal: signal.compute(raw) for signal in signals if signal.reads is DecoderUpdate}


class TextRotary:
    """The rotary embedding of a language model, called with positions (B, n) of text whatever positions it has."""

    def __init__(self, rotary: Any, multi_axis: bool) -> None:
        self._rotary, self._multi_axis = rotary, multi_axis

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> Any:
        """Return cosines and sines (B, n, d)."""
        return self._rotary(x, positions.expand(3, *positions.shape) if self._multi_axis else positions)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._rotary, name)


@torch.no_grad()
def see_call(
    compression: Compression,
    forward: ForwardState,
    layer: int,
    module: Any,
    given: Mapping[str, Any],
    output: Any,
) -> None:
    """Compute the signals of a call of the attention module of a layer, while it reads a prompt."""
    if forward.prompt is None or forward.prompt.decided(_CACHE) or forward.cache is None:
        return
    rows, length = forward.first_rows(), forward.source_index.shape[1]
    text, hidden = compression.adapter.text_model, given["hidden_states"].detach()
    keys, values = (entries.to(hidden.device) for entries in keys_and_values(forward.cache, layer))
    cos, sin = given["position_embeddings"]
    probabilities = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    raw = DecoderCall(
        text,
        module,
        hidden[rows],
        keys[rows, :, -length:].detach(),
        values[rows, :, -length:].detach(),
        (cos.expand(len(hidden), -1, -1)[rows], sin.expand(len(hidden), -1, -1)[rows]),
        TextRotary(text.rotary_emb, compression.adapter.multi_axis_positions),
        None if probabilities is None else probabilities[rows, ..., -length:].detach(),
        forward.prompt_columns()[rows] >= 0,
    )
    signals = [signal for signal in compression.plan.cache_signals if signal.reads is DecoderCall]
    found = forward.entry_values.setdefault(layer, {})
    found |= _computed(signals, raw, compression.plan.after_prefill[0].selector.name)


def _begin_layer(signals: Sequence[Signal], layer: int, forward: ForwardState, hidden: torch.Tensor) -> None:
    """Compute the signals of the hidden states that enter a layer; keep these where its attention is to be compared."""
    rows = forward.first_rows()
    raw = DecoderHidden(hidden.detach()[rows])
    forward.entry_values[layer] = {signal: signal.compute(raw) for signal in signals if signal.reads is DecoderHidden}
    if any(signal.reads is DecoderUpdate for signal in signals):
        forward.entering[layer] = hidden.detach()


def _look_ahead(
    compression: Compression, layer: int, forward: ForwardState, hidden: torch.Tensor, tables: Any, see: Recording
) -> None:
    """Let `see` see the attention that `layer` would compute on the current tokens, and none of it be computed."""
    adapter = compression.adapter

    def behind_past(query: Any, key: Any, value: Any, *others: Any) -> None:
        if forward.past and forward.cache is not None:  # an earlier turn of the conversation
            stored = (entries.to(key.device) for entries in keys_and_values(forward.cache, layer))
            past = forward.keys_of(layer).shape[1] - key.shape[2]
            key, value = (
                torch.cat([old[:, :, :past], new], dim=2) for old, new in zip(stored, (key, value), strict=True)
            )
        see(query, key, value, *others)

    arguments = {
        "hidden_states": adapter.before_attention(layer, hidden.detach()),
        "attention_mask": None,
        _TABLES: forward.rotary(layer, tables),
    }
    look_ahead(adapter.decoder_attention(layer), arguments, forward.prompt_columns().argmax(dim=1), behind_past)


def _record(
    compression: Compression,
    following: PlannedStage | None,
    at_cache: Sequence[Signal],
    layer: int,
    forward: ForwardState,
) -> None:
    """Record the attention of this layer, if the stage behind it or one at the cache requires a signal of it."""
    signals = [signal for signal in at_cache if signal.reads is DecoderAttention]
    behind = [] if following is None else [s for s in following.stage.requires if s.reads is DecoderAttention]
    if following is not None and behind:
        require_whole_prompt(forward, following)
    if not signals and not behind:
        return
    observed = _observed(layer, forward, DecoderAttention)

    def record(*seen: Any) -> None:
        raw = observed(*seen)
        if following is not None and behind:
            forward.records[layer] = _computed(behind, raw, following.selector.name)
        if signals:
            at = raw.rows(forward.first_rows())
            forward.entry_values[layer] |= _computed(signals, at, compression.plan.after_prefill[0].selector.name)

    record_once(compression.adapter.decoder_attention(layer), record)


def _observed(layer: int, forward: ForwardState, kind: type[DecoderAttention]) -> Callable[..., DecoderAttention]:
    """Make what turns queries and keys of `layer`, as they pass to the attention function, into an observation."""
    keys = forward.keys_of(layer)
    visibility = kernels.VisibilityMask(forward.source_index, keys, forward.types.windows[layer], forward.blocks)
    columns, visual = forward.prompt_columns(), forward.visual()
    valid, text = forward.valid, (columns >= 0) & ~visual

    def observed(
        query: Any, key: Any, value: Any, mask: Any, scaling: float, kwargs: Mapping[str, Any]
    ) -> DecoderAttention:
        return kind(query, key, value, scaling, visibility, keys.shape[1], valid, text, visual, columns.argmax(dim=1))

    return observed


def _computed(signals: Sequence[Signal], raw: Observation, method: str) -> dict[Signal, torch.Tensor]:
    try:
        return {signal: signal.compute(raw) for signal in signals}
    except InputError as error:
        names = ", ".join(signal.name for signal in signals)
        raise InputError(f"{method} needs {names}, but {error}") from error
