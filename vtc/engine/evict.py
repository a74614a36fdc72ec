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
from vtc.engine.compression import Compression
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
    chosen: list[list[tuple[_Entries, Eviction | None]]] = [[] for _ in layers]
    with torch.no_grad():
        for row in range(prompt.rows):
            found = {start: _entries(forward, stage, method, row, start) for start, _ in forward.key_groups}
            entries = [found[forward.group_of(layer)] for layer in layers]
            contexts = [
                _context(forward, stage, method, row, layer, each, values.get(layer, {}))
                for layer, each in enumerate(entries)
            ]
            began = time.perf_counter()
            counts = method.share(contexts)
            for layer, count in enumerate(counts):
                chosen[layer].append((entries[layer], _evict(method, contexts[layer], count)))
            prompt.spend(stage.site, 1e3 * (time.perf_counter() - began))
    stored = [_shorten(forward, layer, chosen[layer]) for layer in layers]
    _regroup(forward, stored)
    forward.entry_values = {}
    _note(forward, prompt, stage, [index for index, _ in stored])
    return any(counts is not None for _, counts in stored)


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
    entries: _Entries,
    values: Mapping[Signal, torch.Tensor],
) -> CacheContext:
    """Make what a method is shown of the entries of a row in one layer."""
    return CacheContext(
        layer=layer,
        layers=len(forward.cache.layers),
        budget=entries.budget,
        places=entries.places,
        length=entries.length,
        visual=entries.visual,
        heads=forward.cache.layers[layer].keys.shape[1],
        scope=method.scope,
        keep_ratio=stage.keep_ratio,
        generator=torch.Generator().manual_seed(stage.config.seed),
        signals={
            signal: signal.present(value[row][entries.tokens] if signal.per_token else value[row])
            for signal, value in values.items()
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


def _shorten(
    forward: ForwardState, layer: int, rows: Sequence[tuple[_Entries, Eviction | None]]
) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """Take evicted entries out of the cache of a layer.

    Returns
    -------
    LongTensor (B, G, P)
        Where each entry stands in the conversation, for all heads (G = 1) or each.
    tuple of int, or None
        How many entries each row of the prompt keeps; None: nothing has left.
    """
    index = forward.keys_of(layer)
    if all(answer is None for _, answer in rows):
        return index[:, None], None
    cached = forward.cache.layers[layer]
    groups = max([1, *(len(answer.keep) for _, answer in rows if answer is not None)])
    tables = [_slots(entries, answer, groups) for entries, answer in rows]
    width = max(table.shape[1] for table in tables)
    slots = torch.stack([nn.functional.pad(table, (width - table.shape[1], 0), value=-1) for table in tables])
    repeats = len(index) // len(rows)
    slots = slots.repeat_interleave(repeats, dim=0).to(index.device)
    for name in ("keys", "values"):
        entries = getattr(cached, name)
        for row, (each, answer) in enumerate(rows):
            if answer is not None and answer.assign is not None:
                entries = _merged(entries, slice(row * repeats, (row + 1) * repeats), each.candidates, answer)
        heads, size = entries.shape[1], entries.shape[3]
        at = slots.clamp(min=0).to(entries.device)[..., None].expand(-1, heads, -1, size)
        setattr(cached, name, entries.gather(2, at))
    taken = index[:, None].expand(-1, groups, -1).gather(2, slots.clamp(min=0))
    return taken.masked_fill(slots < 0, -1), tuple(table.shape[1] for table in tables)


def _slots(entries: _Entries, answer: Eviction | None, groups: int) -> torch.Tensor:
    """(G, M') long, ascending: the slots of a row that stay."""
    if answer is None:
        return entries.valid.expand(groups, -1)
    fixed = entries.valid[~torch.isin(entries.valid, entries.candidates)]
    kept = entries.candidates[answer.keep.to(fixed.device)].expand(groups, -1)
    return torch.cat([fixed.expand(groups, -1), kept], dim=1).sort(dim=1).values


def _merged(entries: torch.Tensor, rows: slice, candidates: torch.Tensor, answer: Eviction) -> torch.Tensor:
    """Keys or values (B, H, P, d) in which kept entries of `rows` have become the means of what is merged into them."""
    candidates = candidates.to(entries.device)
    kept = candidates[answer.keep.to(entries.device)].expand(entries.shape[1], -1)
    kept = kept[..., None].expand(-1, -1, entries.shape[3])
    changed = [own.scatter(1, kept, answer.merge(own[:, candidates])) for own in entries[rows]]
    return torch.cat([entries[: rows.start], torch.stack(changed), entries[rows.stop :]])


def _regroup(forward: ForwardState, stored: Sequence[tuple[torch.Tensor, tuple[int, ...] | None]]) -> None:
    """Write down what the layers store; neighbours that are padded alike share a group, and so a mask."""
    groups: list[tuple[int, torch.Tensor]] = []
    complete: set[int] = set()
    before: tuple[int, ...] | int | None = None
    for layer, (index, counts) in enumerate(stored):
        start = forward.group_of(layer)
        kind = start if counts is None else counts
        if kind == before:
            continue
        before = kind
        groups.append((layer, index[:, 0]))
        if start in forward.complete if counts is None else len(set(counts)) == 1:
            complete.add(layer)
    forward.key_groups, forward.complete = groups, complete


def _note(forward: ForwardState, prompt: Prompt, stage: PlannedStage, stored: Sequence[torch.Tensor]) -> None:
    """Write down for the report which columns of the prompt each layer stores."""
    tables = []
    for index in stored:
        columns = index[forward.first_rows()] - prompt.offset
        tables.append(
            torch.where((index[forward.first_rows()] >= 0) & (columns < prompt.columns), columns, -1).clamp(min=-1)
        )
    prompt.stored = tables
    anywhere = torch.zeros_like(prompt.visual)
    for columns in tables:
        rows = torch.arange(prompt.rows, device=columns.device)[:, None, None].expand_as(columns)
        anywhere[rows[columns >= 0], columns[columns >= 0]] = True
    for segment in prompt.segments:
        left = anywhere[segment.row, segment.columns[segment.kept]]
        segment.apply(stage.site, Selection(len(left), left.nonzero()[:, 0]))
    prompt.decide(stage.site)
