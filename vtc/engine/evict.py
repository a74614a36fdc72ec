"""Eviction layer by layer: a method is shown the entries of each row in a layer, and what it drops leaves the cache.

Rows that keep different numbers are padded on the left. Within a layer all heads of a row keep equally many entries, so
that one mask serves them all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vtc.core.eviction import CacheContext, CacheSelector, Eviction
from vtc.core.selection import Selection
from vtc.core.signals import Signal
from vtc.core.sites import CacheAfterPrefill, CacheWhileDecoding
from vtc.engine.compression import Compression
from vtc.engine.decoding import begin
from vtc.engine.entries import keys_and_values, replace_keys_and_values
from vtc.engine.plan import PlannedStage
from vtc.engine.prompt import Prompt
from vtc.engine.recorder import UNSEEN
from vtc.engine.state import ForwardState
from vtc.errors import InputError, StateError

__all__ = ["evict_by_layer"]


@dataclass(frozen=True, eq=False)
class _Entries:
    """The entries of one row of a prompt in the caches of layers that store the same tokens.

    Attributes
    ----------
    valid
        (M,) long: slots that hold an entry of the row.
    length
        How many of them are of the prompt.
    candidates
        (N,) long: slots of those that may leave.
    tokens
        (N,) long: their tokens, among those of the pass that have come to the layer.
    places
        (N,) long: their places among the `length`.
    visual
        (N,) bool: whether they are visual.
    budget
        How many of the N stay if layers are treated alike.
    """

    valid: torch.Tensor
    length: int
    candidates: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor
    visual: torch.Tensor
    budget: int


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What a method says of the entries of one row in one layer; `answer` None: all stay."""

    entries: _Entries
    context: CacheContext
    answer: Eviction | None


@dataclass(frozen=True, eq=False)
class _Stored:
    """What a layer's cache holds in the end.

    Attributes
    ----------
    index
        (B, G, P) long: where each entry stands in the conversation, for all heads (G = 1) or each; -1 for padding.
    slots
        (B, G, P) long: slot that each entry came from, -1 for padding; None: nothing was moved.
    counts
        How many entries each row of the prompt has, if they were moved.
    """

    index: torch.Tensor
    slots: torch.Tensor | None = None
    counts: tuple[int, ...] = ()


def evict_by_layer(compression: Compression, forward: ForwardState, stage: PlannedStage, method: CacheSelector) -> bool:
    """Let a method choose among the entries of every layer, and take what it drops out of the caches.

    Returns
    -------
    bool
        Whether any entry left.
    """
    prompt = forward.attached()
    values = _values(forward, stage)
    layers = range(len(forward.cache.layers))
    heads = [keys_and_values(forward.cache, layer)[0].shape[1] for layer in layers]
    chosen: list[list[_Chosen]] = [[] for _ in layers]
    with torch.no_grad():
        for row in range(prompt.rows):
            found = {start: _entries(forward, stage, method, row, start) for start, _ in forward.key_groups}
            entries = [found[forward.group_of(layer)] for layer in layers]
            contexts = [
                _context(forward, stage, method, row, layer, heads[layer], each, values.get(layer, {}))
                for layer, each in enumerate(entries)
            ]
            began = time.perf_counter()
            counts = method.share(contexts)
            for layer, count in enumerate(counts):
                context = contexts[layer]
                chosen[layer].append(_Chosen(entries[layer], context, _evict(method, context, count)))
            prompt.spend(stage.site, 1e3 * (time.perf_counter() - began))
    decoding = isinstance(stage.site, CacheWhileDecoding)
    stored = [_shorten(forward, layer, chosen[layer], pack=decoding) for layer in layers]
    if decoding:
        scores = [_scores(forward, method, own, rows) for own, rows in zip(stored, chosen, strict=True)]
    _regroup(forward, stored)
    forward.entry_values = {}
    _note(forward, prompt, [own.index for own in stored])
    if decoding:
        forward.decoding = begin(forward, method, scores if method.accumulates else [])
    return decoding or any(own.slots is not None for own in stored)


def _values(forward: ForwardState, stage: PlannedStage) -> dict[int, dict[Signal, torch.Tensor]]:
    """Return the signals of every layer.

    Raises
    ------
    StateError
        A layer ran without its attention being seen.
    """
    for layer in range(len(forward.cache.layers)):
        if any(signal not in forward.entry_values.get(layer, {}) for signal in stage.stage.requires):
            raise StateError(f"decoder layer {layer} ran without its attention being seen: {UNSEEN}")
    return forward.entry_values


def _entries(forward: ForwardState, stage: PlannedStage, method: CacheSelector, row: int, layer: int) -> _Entries:
    """Find the entries of a row of the prompt in the cache of a layer, and how many of them may stay."""
    prompt = forward.attached()
    index = forward.keys_of(layer)[forward.first_row(row)]
    past = forward.history.keys_of(layer).shape[1]
    columns = index - prompt.offset
    own = ((index >= 0) & (columns >= 0) & (columns < prompt.columns)).nonzero()[:, 0]
    columns = columns[own]
    if method.scope == "visual":
        segments = prompt.segment_of_columns()[row, columns]
        places = (segments >= 0).nonzero()[:, 0]
        sizes = torch.bincount(segments[places]).tolist()
    elif any(segment.row == row for segment in prompt.segments):
        places = torch.arange(len(own), device=own.device)
        sizes = [len(own)]
    else:  # a row without a picture stays as it is, in company as it would alone
        places, sizes = own[:0], []
    return _Entries(
        valid=(index >= 0).nonzero()[:, 0],
        length=len(own),
        candidates=own[places],
        tokens=own[places] - past,
        places=places,
        visual=prompt.visual[row, columns[places]],
        budget=sum(stage.budget(size) for size in sizes if size),
    )


def _context(
    forward: ForwardState,
    stage: PlannedStage,
    method: CacheSelector,
    row: int,
    layer: int,
    heads: int,
    entries: _Entries,
    values: Mapping[Signal, torch.Tensor],
) -> CacheContext:
    """Make what a method is shown of the entries of a row in one layer."""
    device = entries.tokens.device  # layers may be spread over several
    own = {signal: value[row].to(device) for signal, value in values.items()}
    return CacheContext(
        layer=layer,
        layers=len(forward.cache.layers),
        budget=entries.budget,
        places=entries.places,
        length=entries.length,
        visual=entries.visual,
        heads=heads,
        scope=method.scope,
        keep_ratio=stage.keep_ratio,
        generator=torch.Generator().manual_seed(stage.config.seed),
        signals={
            signal: signal.present(value[entries.tokens] if signal.per_token else value)
            for signal, value in own.items()
        },
    ).check()


def _evict(method: CacheSelector, context: CacheContext, count: int) -> Eviction | None:
    """Ask the method for `count` of the entries of one layer; None if nothing leaves.

    Raises
    ------
    InputError
        The answer is of other entries or heads, or keeps another number of them.
    """
    if count >= context.n:
        return None
    context.budget = count
    answer = method.evict(context)
    if (
        answer.n != context.n
        or len(answer.keep) not in (1, context.heads)
        or (answer.k != count and not method.adaptive)
    ):
        raise InputError(
            f"{method.name} was asked for {count} of {context.n} entries of layer {context.layer} with {context.heads} "
            f"heads, and answered with {answer.k} of {answer.n} for {len(answer.keep)}"
        )
    return answer


def _shorten(forward: ForwardState, layer: int, rows: Sequence[_Chosen], *, pack: bool) -> _Stored:
    """Take evicted entries out of the cache of a layer; with `pack` move padding to the left where none leave, too."""
    index = forward.keys_of(layer)
    if all(row.answer is None for row in rows) and not pack:
        return _Stored(index[:, None])
    groups = max([1, *(len(row.answer.keep) for row in rows if row.answer is not None)])
    tables = [_slots(row, groups) for row in rows]
    width = max(table.shape[1] for table in tables)
    slots = torch.stack([nn.functional.pad(table, (width - table.shape[1], 0), value=-1) for table in tables])
    repeats = len(index) // len(rows)
    slots = slots.repeat_interleave(repeats, dim=0).to(index.device)
    shortened = []
    for entries in keys_and_values(forward.cache, layer):
        for number, row in enumerate(rows):
            if row.answer is not None and row.answer.assign is not None:
                those = slice(number * repeats, (number + 1) * repeats)
                entries = _merged(entries, those, row.entries.candidates, row.answer)
        at = slots.clamp(min=0).to(entries.device)[..., None]
        shortened.append(entries.gather(2, at.expand(-1, entries.shape[1], -1, entries.shape[3])))
    replace_keys_and_values(forward.cache, layer, *shortened)
    taken = index[:, None].expand(-1, groups, -1).gather(2, slots.clamp(min=0))
    return _Stored(taken.masked_fill(slots < 0, -1), slots, tuple(table.shape[1] for table in tables))


def _scores(forward: ForwardState, method: CacheSelector, stored: _Stored, rows: Sequence[_Chosen]) -> torch.Tensor:
    """(B, Hkv, P) float32: scores that entries have when decoding begins; infinite for those of earlier turns."""
    if stored.slots is None:
        raise RuntimeError("entries were not packed")
    heads, repeats = rows[0].context.heads, len(stored.slots) // len(rows)
    width = max(int(row.entries.valid[-1]) + 1 if len(row.entries.valid) else 1 for row in rows)
    table = torch.full((len(rows), heads, width), torch.inf, device=stored.slots.device)
    for number, row in enumerate(rows):
        if method.accumulates and row.context.n:
            table[number, :, row.entries.candidates] = method.accumulated(row.context).float()
    table = table.repeat_interleave(repeats, dim=0)
    return table.gather(2, stored.slots.clamp(min=0).expand(-1, heads, -1))


def _slots(row: _Chosen, groups: int) -> torch.Tensor:
    """(G, M') long, ascending: the slots of a row that stay."""
    valid, candidates, answer = row.entries.valid, row.entries.candidates, row.answer
    if answer is None:
        return valid.expand(groups, -1)
    fixed = valid[~torch.isin(valid, candidates)]
    kept = candidates[answer.keep.to(fixed.device)].expand(groups, -1)
    return torch.cat([fixed.expand(groups, -1), kept], dim=1).sort(dim=1).values


def _merged(entries: torch.Tensor, rows: slice, candidates: torch.Tensor, answer: Eviction) -> torch.Tensor:
    """Keys or values (B, H, P, d) in which kept entries of `rows` have become the means of what is merged into them."""
    candidates = candidates.to(entries.device)
    kept = candidates[answer.keep.to(entries.device)].expand(entries.shape[1], -1)
    kept = kept[..., None].expand(-1, -1, entries.shape[3])
    changed = [own.scatter(1, kept, answer.merge(own[:, candidates])) for own in entries[rows]]
    return torch.cat([entries[: rows.start], torch.stack(changed), entries[rows.stop :]])


def _regroup(forward: ForwardState, stored: Sequence[_Stored]) -> None:
    """Write down what the layers store; neighbours that are padded alike share a group, and so a mask."""
    groups: list[tuple[int, torch.Tensor]] = []
    complete: set[int] = set()
    before: tuple[int, ...] | int | None = None
    for layer, own in enumerate(stored):
        start = forward.group_of(layer)
        kind = start if own.slots is None else own.counts
        if kind == before:
            continue
        before = kind
        groups.append((layer, own.index[:, 0]))
        if start in forward.complete if own.slots is None else len(set(own.counts)) == 1:
            complete.add(layer)
    forward.replace_keys(groups, complete)


def _note(forward: ForwardState, prompt: Prompt, stored: Sequence[torch.Tensor]) -> None:
    """Write down for the report which columns of the prompt each layer stores."""
    prompt.stored = []
    anywhere = torch.zeros_like(prompt.visual)
    for index in stored:
        index = index[forward.first_rows()]
        columns = index - prompt.offset
        columns = torch.where((index >= 0) & (columns >= 0) & (columns < prompt.columns), columns, -1)
        prompt.stored.append(columns.cpu())
        rows = torch.arange(prompt.rows, device=columns.device)[:, None, None].expand_as(columns)
        anywhere[rows[columns >= 0], columns[columns >= 0]] = True
    for segment in prompt.segments:
        left = anywhere[segment.row, segment.columns[segment.kept]]
        segment.apply(CacheAfterPrefill(), Selection(len(left), left.nonzero()[:, 0]))
    prompt.decide(CacheAfterPrefill())
