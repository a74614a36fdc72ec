"""While decoding: after each pass behind the prompt, entries leave the caches by a method's rule.

What leaves is overwritten by the oldest entry of its row, and the row becomes one shorter at its left end, so that a
step moves as many entries as leave. The order of entries in a cache no longer matters by then: keys are rotated, and
every later token sees all of them. Only the latest stand where they were appended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vtc import kernels
from vtc.core.eviction import CacheSelector, DecodingState, Leaving
from vtc.engine.preallocated import PreallocatedLayer
from vtc.engine.recorder import UNSEEN, record_once
from vtc.engine.state import ForwardState
from vtc.errors import StateError

__all__ = ["DecodingCaches", "after_step", "begin", "record_step"]

_NEVER = 2**31  # entries that a row without a picture may hold: it is left alone, in company as it would be alone


@dataclass(eq=False)
class DecodingCaches:
    """What a method that evicts while decoding has to know of the caches of one conversation.

    Attributes
    ----------
    method : CacheSelector
    kept, stored : LongTensor (B, L), on the CPU
        Entries per row and layer: after the prefill, and now.
    read, seen : LongTensor (B,), on the CPU
        Tokens that each row has seen: after the prefill, and now.
    scores : list of Tensor (B, Hkv, P)
        Per layer, of methods that accumulate attention.
    """

    method: CacheSelector
    kept: torch.Tensor
    stored: torch.Tensor
    read: torch.Tensor
    seen: torch.Tensor
    scores: list[torch.Tensor] = field(default_factory=list)

    def map(self, rows: Any) -> DecodingCaches:
        """Apply a function of a tensor with the batch first to everything that has one."""
        kept, stored, read, seen = (rows(x) for x in (self.kept, self.stored, self.read, self.seen))
        return replace(self, kept=kept, stored=stored, read=read, seen=seen, scores=[rows(x) for x in self.scores])


def begin(forward: ForwardState, method: CacheSelector, scores: Sequence[torch.Tensor]) -> DecodingCaches:
    """Note what the prefill has left, from which the rule of the method starts.

    Parameters
    ----------
    forward
        The pass that has read the prompt.
    method
    scores
        Per layer (B, Hkv, P), aligned with its entries; none, unless the method accumulates attention.
    """
    layers = range(len(forward.cache.layers))
    for layer in forward.cache.layers:  # which would copy all of itself to take up one token
        layer.__class__ = PreallocatedLayer
    stored = torch.stack([(forward.keys_of(layer) >= 0).sum(dim=1) for layer in layers], dim=1).cpu()
    seen = _valid(forward)
    kept = stored.clone()
    pictures = forward.attached().rows_with_pictures().repeat_interleave(len(kept) // forward.attached().rows)
    kept[~pictures] = _NEVER
    before = forward.history.decoding
    if before is not None:
        seen = seen + before.seen
    else:
        seen = seen + (forward.history.keys_of(0) >= 0).sum(dim=1).cpu()
    return DecodingCaches(method, kept, stored, seen, seen.clone(), list(scores))


def record_step(forward: ForwardState, layer: int, attention: Any) -> None:
    """Record how much attention each entry of a layer receives in this pass, where the method accumulates it."""
    decoding = forward.history.decoding
    if decoding is None or not decoding.method.accumulates:
        return
    keys, valid = forward.keys_of(layer), forward.valid

    def record(query: Any, key: Any, value: Any, mask: Any, scaling: float, kwargs: Mapping[str, Any]) -> None:
        if query.shape[2] == 1:  # one query sees all keys: no tiles are needed
            grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1)).float() * scaling
            logits = grouped @ key.float().transpose(2, 3)
            rows = logits.masked_fill((keys < 0)[:, None, None], -torch.inf).softmax(dim=-1)
            forward.step_scores[layer] = rows.mean(dim=2).masked_fill(~valid[:, None], 0.0)
            return
        visibility = kernels.VisibilityMask(forward.source_index, keys)
        sums = kernels.attention_column_sums(query, key, scaling, valid[:, None, None].float(), visibility)
        forward.step_scores[layer] = sums[:, :, 0].unflatten(1, (key.shape[1], -1)).mean(dim=2)

    record_once(attention, record)


@torch.no_grad()
def after_step(forward: ForwardState, *, evict: bool = True) -> bool:
    """Let entries leave the caches by the rule of the method, after a pass that brought no new picture.

    Without `evict` the pass is only counted.

    Returns
    -------
    bool
        Whether any has left.

    Raises
    ------
    StateError
        A layer ran without its attention being seen.
    """
    decoding = forward.history.decoding
    if decoding is None:
        return False
    new = _valid(forward)
    decoding.seen += new
    decoding.stored += new[:, None]
    groups: list[tuple[int, torch.Tensor]] = []
    complete: set[int] = set()
    before: list[int] | None = None
    moved = False
    for layer, cached in enumerate(forward.cache.layers):
        if decoding.method.accumulates:
            if layer not in forward.step_scores:
                raise StateError(f"decoder layer {layer} ran without its attention being seen: {UNSEEN}")
            _accumulate(decoding, layer, forward.step_scores[layer])
        answers = _ask(decoding, layer) if evict else []
        if any(answer.count for answer in answers):
            _remove(decoding, layer, cached, answers)
            moved = True
        counts = decoding.stored[:, layer].tolist()
        width = cached.keys.shape[2]
        if before != [*counts, width]:
            before = [*counts, width]
            groups.append((layer, _padding(counts, width, forward)))
            if min(counts) == width:
                complete.add(layer)
    forward.step_scores = {}
    if moved:
        forward.replace_keys(groups, complete)
    return moved


def _valid(forward: ForwardState) -> torch.Tensor:
    """(B,) on the CPU: tokens of this pass that are no padding."""
    if forward.complete:
        return torch.full((len(forward.source_index),), forward.length)
    return (forward.arrived >= 0).sum(dim=1).cpu()


def _accumulate(decoding: DecodingCaches, layer: int, added: torch.Tensor) -> None:
    """Add the attention of this pass to the scores of the entries, which have become more."""
    before = decoding.scores[layer]
    scores = torch.nn.functional.pad(before, (0, added.shape[2] - before.shape[2]))
    decoding.scores[layer] = scores + added.to(scores)


def _ask(decoding: DecodingCaches, layer: int) -> list[Leaving]:
    """Ask the method what leaves each row of a layer; rows in the same state get the same answer."""
    numbers = zip(
        decoding.stored[:, layer].tolist(),
        decoding.kept[:, layer].tolist(),
        decoding.seen.tolist(),
        decoding.read.tolist(),
        strict=True,
    )
    known: dict[tuple[int, ...], Leaving] = {}
    answers = []
    for state in numbers:
        if state not in known:
            known[state] = decoding.method.leaving(DecodingState(layer, *state))
        answers.append(known[state])
    return answers


def _remove(decoding: DecodingCaches, layer: int, cached: Any, answers: Sequence[Leaving]) -> None:
    """Take entries out of the cache of a layer, one per row at a time, and cut off columns that are padding in all."""
    device = cached.keys.device
    stored = decoding.stored[:, layer]
    planes = [cached.keys, cached.values]
    tables = [decoding.scores[layer]] if decoding.scores else []
    for turn in range(max(answer.count for answer in answers)):
        width = cached.keys.shape[2]
        going = torch.tensor([answer.count > turn for answer in answers])
        first = width - stored
        if answers[0].place is None:
            recent = torch.tensor([answer.recent for answer in answers])
            scores = decoding.scores[layer]
            victim = _lowest(scores, first.to(scores.device), (width - recent).to(scores.device)).to(device)
        else:
            places = torch.tensor([answer.place or 0 for answer in answers])
            victim = (first + places.clamp(max=stored - 1)).to(device)[:, None].expand(-1, cached.keys.shape[1])
        at = first.to(device)[:, None].expand_as(victim)
        victim = torch.where(going.to(device)[:, None], victim, at)
        for entries in planes:
            size = entries.shape[3]
            oldest = entries.gather(2, at[..., None, None].expand(-1, -1, 1, size))
            entries.scatter_(2, victim[..., None, None].expand(-1, -1, 1, size), oldest)
        for table in tables:
            from_, to = at[..., None].to(table.device), victim[..., None].to(table.device)
            table.scatter_(2, to, table.gather(2, from_))
        stored -= going.long()
    cut = cached.keys.shape[2] - int(stored.max())
    cached.keys, cached.values = cached.keys[:, :, cut:], cached.values[:, :, cut:]
    if tables:
        decoding.scores[layer] = decoding.scores[layer][:, :, cut:]


def _lowest(scores: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """(B, Hkv) long: slot of the lowest score from slot `first` (B,) to before slot `last` (B,)."""
    slots = torch.arange(scores.shape[2], device=scores.device)
    outside = (slots < first[:, None]) | (slots >= torch.maximum(last, first + 1)[:, None])
    return scores.masked_fill(outside[:, None], torch.inf).argmin(dim=2)


def _padding(counts: Sequence[int], width: int, forward: ForwardState) -> torch.Tensor:
    """(B, P) long: -1 for padding. Which token an entry is of is no longer told, but it is of an earlier one."""
    index = torch.arange(forward.seen - width, forward.seen, device=forward.source_index.device).clamp(min=0)
    slots = torch.arange(width, device=index.device)
    padding = slots < width - torch.tensor(counts, device=index.device)[:, None]
    return index.expand(len(counts), -1).masked_fill(padding, -1)
