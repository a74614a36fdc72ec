"""State: one object per call of the model, one per forward pass of its language model.

A call is one `generate`, or one bare forward pass. It knows the prompt and what was encoded for it. A forward pass
knows which tokens are in it now, where they stand in the uncompressed conversation, and which masks and tables each
decoder layer needs. Both belong to the thread or task that runs them, and calls nest.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vtc.core.packing import PackPlan
from vtc.core.selection import Selection
from vtc.core.signals import Signal
from vtc.engine.cache import CacheRecord, Owner, compacted, record_of
from vtc.engine.encoder import Encoded
from vtc.engine.masks import LayerTypes, causal_mask
from vtc.engine.prompt import Prompt
from vtc.engine.recorder import recording
from vtc.engine.updating import PictureMemory
from vtc.errors import UnsupportedModelError

__all__ = ["CallState", "ForwardInputs", "ForwardState", "Mode", "PrebuiltMasks", "calling", "current_call"]


class Mode(enum.Enum):
    """Purpose of a forward pass of the language model."""

    READ = enum.auto()
    """Reads tokens of a prompt, of which some may leave, or continues behind a compressed one."""

    APPEND = enum.auto()
    """Reads tokens that were selected elsewhere: they only have to stand where they stood."""


@dataclass(eq=False)
class ForwardInputs:
    """Arguments of the current forward pass of the whole model."""

    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    encoded: dict[str, Encoded | None] = field(default_factory=dict)  # None: the pass will encode it itself


@dataclass(eq=False)
class PrebuiltMasks:
    """A decode step whose masks were built ahead of a compiled region: one per layer, None for the model's own.

    Where hidden states are to be updated, `forward` is its state.
    """

    masks: list[Any]
    forward: ForwardState | None = None


@dataclass(eq=False)
class CallState:
    """One `generate`, or one bare forward pass.

    Attributes
    ----------
    engine
        Whose call it is.
    bare
        Whether it is a forward pass outside `generate`.
    prompt_ids, prompt_offset, prompt_valid
        In `generate`: ids (S, P) of the prompt or turn, tokens of the conversation before it, and which are no padding.
        None where every forward pass brings its own: outside `generate`, and with embeddings instead of ids.
    prompt
        Its images and videos, once they were found.
    mask
        2-D attention mask of the step, where a static cache hides it from the model.
    encoded
        What the encoders made, by modality.
    inputs
        Of the current forward pass of the whole model.
    forward
        State of the current pass of the language model; None: it does what it always does.
    announced
        In `generate`: whether its next forward pass was prepared. A pass that was not is somebody else's, such as the
        unconditional one of classifier-free guidance, and a call of its own.
    noted
        The prompt that the report is to tell of.
    outer
        The call that this one is nested in.
    """

    engine: Any
    bare: bool
    prompt_ids: torch.Tensor | None = None
    prompt_offset: int = 0
    prompt_valid: torch.Tensor | None = None
    prompt: Prompt | None = None
    mask: torch.Tensor | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    inputs: ForwardInputs = field(default_factory=ForwardInputs)
    forward: ForwardState | PrebuiltMasks | None = None
    announced: bool = False
    noted: Prompt | None = None
    outer: CallState | None = None

    @property
    def outermost(self) -> bool:
        """Whether it runs inside no other call of its engine."""
        outer = self.outer
        while outer is not None and outer.engine is not self.engine:
            outer = outer.outer
        return outer is None

    def note(self, prompt: Prompt) -> None:
        """Note a prompt for the report; that of a call inside another is the outer one's business, not the user's."""
        self.noted = prompt
        if self.outermost:
            self.engine.calls.note(self, prompt)


_CALL: ContextVar[CallState | None] = ContextVar("vtc_call", default=None)


def current_call(engine: Any) -> CallState | None:
    """Return the innermost call of `engine` in this thread or task."""
    call = _CALL.get()
    while call is not None and call.engine is not engine:
        call = call.outer
    return call


@contextmanager
def calling(call: CallState) -> Iterator[CallState]:
    """Make `call` the current one while entered, inside the one that is current now."""
    call.outer = _CALL.get()
    token = _CALL.set(call)
    calls = call.engine.calls
    try:
        if call.outermost:
            calls.open(call)
        with recording({}):  # what the call leaves half recorded ends with it
            yield call
            if call.outermost and call.noted is not None:
                calls.collect(call.noted)
    finally:
        _CALL.reset(token)
        if call.outermost:
            calls.close(call)


class ForwardState:
    """One pass of the language model over B rows of T current tokens.

    Attributes
    ----------
    mode : Mode
    source_index : LongTensor (B, T)
        Where every current token stands in the uncompressed conversation; -1 for padding.
    key_groups : list of (start_layer, LongTensor (B, P))
        As in `CacheRecord`, this pass's tokens included.
    complete : set of int
        Starts of groups that are known to have no padding, current tokens included.
    packed : PackPlan or None
        What was packed before the first layer.
    layer_plans : list of (layer, PackPlan)
        What was packed on entering decoder layers.
    layer_merges : dict of layer to list of (row, LongTensor (N,), Selection)
        What was merged there just before: the tokens of a row that one selection is about, and the selection.
    memories : list of PictureMemory
        What methods that update hidden states remember of the pictures so far.
    updated : dict of layer to (LongTensor (B, T), BoolTensor (B, T) or None)
        Tokens that came to a layer where hidden states are updated, and which of them are visual.
    prompt : Prompt or None
        The prompt, if this pass brings visual tokens; `prompt_row` (B,) has the prompt's row of every row.
    """

    def __init__(
        self,
        types: LayerTypes,
        cache: Any,
        source_index: torch.Tensor,
        past: int,
        history: CacheRecord,
        mode: Mode = Mode.READ,
        *,
        generated: bool = False,  # whether the current tokens are known to be no padding
    ) -> None:
        self.types, self.cache, self.past, self.mode = types, cache, past, mode
        # A copy: `write_record` moves on the one that the cache holds.
        self.history = replace(history, groups=list(history.groups), complete=set(history.complete))
        self.source_index = source_index
        self.length = source_index.shape[1]
        self.seen = past + self.length
        self.arrived = source_index
        self.key_groups = [(start, torch.cat([keys, source_index], dim=1)) for start, keys in history.groups]
        if history.complete and not generated:  # masks of static caches are made whatever is known
            generated = not getattr(cache, "is_compileable", False) and bool((source_index >= 0).all())
        self.complete = set(history.complete) if generated else set()
        self._full: set[int] = set()
        self.blocks: torch.Tensor | None = None
        self.packed: PackPlan | None = None
        self.layer_plans: list[tuple[int, PackPlan]] = []
        self.layer_merges: dict[int, list[tuple[int, torch.Tensor, Selection]]] = {}
        self.memories: list[PictureMemory] = list(history.memories)
        self.updated: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.prompt: Prompt | None = None
        self.prompt_row: torch.Tensor | None = None
        self.shift = history.shift
        self.records: dict[int, dict[Signal, torch.Tensor]] = {}  # of a decoder layer, until the stage behind it
        self.decoding: Any = history.decoding
        self.step_scores: dict[int, torch.Tensor] = {}  # decoder layer -> (B, Hkv, P) attention of this pass
        self.entering: dict[int, torch.Tensor] = {}  # decoder layer -> hidden states, until its attention has run
        self.entry_values: dict[int, dict[Signal, torch.Tensor]] = {}  # decoder layer -> (S, T, ...) for the cache
        self._masks: dict[tuple[int, str], Any] = {}
        self._unmasked: set[str] = set()  # types of layers that need no mask where nothing is padded
        self._rotary: dict[tuple[int, str], Any] = {}

    # -- tokens ---------------------------------------------------------------------------------------------------

    @property
    def valid(self) -> torch.Tensor:
        """(B, T) bool: current tokens that are no padding."""
        return self.source_index >= 0

    @property
    def touched(self) -> bool:
        """Whether anything differs from what the model would do by itself."""
        return self.packed is not None or bool(self.layer_plans) or record_of(self.cache) is not None

    def attach_prompt(self, prompt: Prompt) -> None:
        """Set the prompt that the current tokens belong to."""
        repeats = len(self.source_index) // prompt.rows
        self.prompt = prompt
        self.prompt_row = torch.arange(len(self.source_index), device=self.source_index.device) // repeats
        prompt.mark_seen(self.source_index[::repeats])

    def remember(self) -> None:
        """Take over what methods remember of the pictures of the attached prompt."""
        prompt, known = self.attached(), {id(memory.values) for memory in self.memories}
        prompt_row = torch.arange(len(self.source_index)) // (len(self.source_index) // prompt.rows)
        for segment in prompt.segments:
            for config, columns, values in segment.memories:
                if id(values) not in known:
                    start, places = prompt.offset + int(segment.columns[0]), prompt.offset + columns
                    self.memories.append(PictureMemory(config, start, places, values, prompt_row == segment.row))

    def prompt_columns(self) -> torch.Tensor:
        """Return (B, T): column of every current token within the prompt, -1 outside."""
        prompt = self.attached()
        columns = self.source_index - prompt.offset
        return torch.where((columns >= 0) & (columns < prompt.columns) & self.valid, columns, -1)

    def brings_all(self) -> bool:
        """Tell whether this pass reads the prompt in one piece."""
        prompt = self.attached()
        return self.past <= prompt.offset and self.seen >= prompt.offset + prompt.columns

    def find(self, row: int, columns: torch.Tensor) -> torch.Tensor:
        """Find the prompt's `columns` among the current tokens of row `row`; -1 for those that are not there."""
        at = torch.full((self.attached().columns + 1,), -1, dtype=torch.long, device=self.source_index.device)
        here = self.prompt_columns()[row]
        at[here] = torch.arange(len(here), device=at.device)
        at[-1] = -1
        return at[columns]

    def keeping(self, keep: torch.Tensor) -> torch.Tensor:
        """Return (B, T) bool: current tokens that a decision about the prompt (S, P) keeps."""
        columns = self.prompt_columns()
        if self.prompt_row is None:
            raise RuntimeError("no prompt was attached")
        return self.valid & ((columns < 0) | keep[self.prompt_row[:, None], columns.clamp(min=0)])

    def keeping_of(self, source_index: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Return (B, P) bool: keys at `source_index` (B, P) that a decision about the prompt (S, P') keeps."""
        prompt = self.attached()
        columns = source_index - prompt.offset
        outside = (columns < 0) | (columns >= prompt.columns)
        if self.prompt_row is None:
            raise RuntimeError("no prompt was attached")
        kept = keep[self.prompt_row[:, None], columns.clamp(0, prompt.columns - 1)]
        return (source_index >= 0) & (outside | kept)

    def visual(self) -> torch.Tensor:
        """Return (B, T) bool: current tokens that are visual tokens of the prompt."""
        columns = self.prompt_columns()
        return (columns >= 0) & self.attached().visual[self.prompt_row].gather(1, columns.clamp(min=0))

    def first_row(self, prompt_row: int) -> int:
        """Return the first of the rows that repeat a row of the prompt."""
        return prompt_row * (len(self.source_index) // self.attached().rows)

    def first_rows(self) -> slice:
        """Return the S rows of the batch that stand for those of the prompt."""
        return slice(0, None, len(self.source_index) // self.attached().rows)

    def attached(self) -> Prompt:
        """Return the prompt that was attached."""
        if self.prompt is None:
            raise RuntimeError("no prompt was attached")
        return self.prompt

    # -- packing --------------------------------------------------------------------------------------------------

    def pack(
        self,
        keep: torch.Tensor,
        planes: Sequence[torch.Tensor],
        dims: Sequence[int],
        marks: torch.Tensor | None = None,
        marked: Sequence[torch.Tensor] = (),
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Drop tokens before the first layer: `planes` and `marked` without them, as `PackPlan.pack` has them."""
        self.packed, packed, rows = self._pack(keep, planes, dims, marks, marked)
        self.key_groups = [(start, torch.cat([keys, self.source_index], dim=1)) for start, keys in self.history.groups]
        self._full = self._followed_by(self.packed, {start for start, _ in self.history.groups})
        return packed, rows

    def pack_at(self, layer: int, keep: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Drop tokens on entering decoder layer `layer`; earlier layers keep theirs. `hidden` without them."""
        plan, (hidden,), _ = self._pack(keep, [hidden], [1])
        self.layer_plans.append((layer, plan))
        before = dict(self.key_groups)
        starts = sorted({start for start, _ in self.history.groups} | before.keys() | {layer})
        earlier, later = ({start for start in starts if (start < layer) == side} for side in (True, False))
        full = {start for start in earlier if start in self._full or bool((before[start] >= 0).all())}
        self._full = full | self._followed_by(plan, later)
        self.key_groups = [
            (
                start,
                before[start] if start < layer else torch.cat([self.history.keys_of(start), self.source_index], dim=1),
            )
            for start in starts
        ]
        self._masks, self._rotary = {}, {}
        return hidden

    def _followed_by(self, plan: PackPlan, starts: set[int]) -> set[int]:
        """Return which of the groups store no padding once the tokens of `plan` are behind their earlier keys."""
        if not bool(plan.mask.all()):
            return set()
        known = {start: not keys.shape[1] or start in self.history.complete for start, keys in self.history.groups}
        return {start for start in starts if known[max(first for first in known if first <= start)]}

    def replace_keys(self, groups: list[tuple[int, torch.Tensor]], complete: set[int]) -> None:
        """Take over other keys per group, and which of the groups store no padding."""
        self.key_groups, self.complete, self._full = groups, complete, set()

    def _pack(
        self,
        keep: torch.Tensor,
        planes: Sequence[torch.Tensor],
        dims: Sequence[int],
        marks: torch.Tensor | None = None,
        marked: Sequence[torch.Tensor] = (),
    ) -> tuple[PackPlan, list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Pack the given planes and those of this state in one operation."""
        self.complete = set()
        own = [self.source_index] if self.blocks is None else [self.source_index, self.blocks]
        planes, dims = [*planes, *own], [*dims, *[1] * len(own)]
        plan, packed, rows = PackPlan.pack(keep, planes, dims, marks=marks, marked=marked)
        if not plan.mask.shape[1]:  # a layer needs a token: one of padding
            first = torch.zeros_like(keep)
            first[:, :1] = True
            plan, packed, _ = PackPlan.pack(first, planes, dims)
            plan = replace(plan, mask=torch.zeros_like(plan.mask), lengths=torch.zeros_like(plan.lengths))
        self.source_index, *blocks = (plane.masked_fill(~plan.mask, -1) for plane in packed[-len(own) :])
        self.blocks = blocks[0] if blocks else None
        return plan, list(packed[: -len(own)]), rows

    def write_record(self, owner: Owner, shift: torch.Tensor | None) -> None:
        """Write to the cache what later passes need to know."""
        self.shift = shift
        if self.cache is not None:
            record = compacted(self.cache)
            record.owner, record.shift = owner, shift
            record.logical, record.groups = self.seen, list(self.key_groups)
            record.complete, record.decoding = self.complete | self._full, self.decoding
            record.memories = list(self.memories)

    def scatter(self, hidden: torch.Tensor) -> torch.Tensor:
        """Put hidden states back among the tokens that came in, with zeros where tokens were dropped."""
        plans = [plan for _, plan in reversed(self.layer_plans)]
        for plan in [*plans, self.packed] if self.packed is not None else plans:
            hidden = plan.scatter(hidden)
        return hidden

    def thin_marked(self, marks: torch.Tensor, marked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the decoder stages so far to marks (B, T0) of visual tokens and one row of `marked` per mark."""
        for _, plan in self.layer_plans:
            kept = plan.scatter(plan.mask)[marks.to(plan.mask.device)]
            marks, marked = plan.take(marks) & plan.mask.to(marks.device), marked[kept.to(marked.device)]
        return marks, marked

    # -- masks and tables of a layer --------------------------------------------------------------------------------

    @property
    def slides(self) -> bool:
        """Whether some layer's window is shorter than what was seen."""
        return self.types.shortest is not None and self.types.shortest < self.seen

    def needs_mask(self, layer: int) -> bool:
        """Tell whether the mask that the language model makes for all layers is wrong for this one."""
        window = self.types.windows[layer]
        return self._key(layer)[0] > 0 or (window is not None and window < self.seen)

    def keys_of(self, layer: int) -> torch.Tensor:
        """Return (B, P): positions of the keys of a layer in the conversation, current ones included."""
        return next(keys for start, keys in reversed(self.key_groups) if start <= layer)

    def group_of(self, layer: int) -> int:
        """Return the start of the group of `key_groups` that a layer belongs to."""
        return max(start for start, _ in self.key_groups if start <= layer)

    def valid_keys(self, layer: int) -> torch.Tensor:
        """Return (B, P) bool: keys of a layer that are no padding."""
        return self.keys_of(layer) >= 0

    def mask(self, layer: int, hidden: torch.Tensor) -> Any:
        """Build the layer's attention mask.

        Raises
        ------
        UnsupportedModelError
            The attention function counts a window in stored tokens, of which there are fewer than were seen.
        """
        key = self._key(layer)
        complete = self.length == 1 and key[0] in self.complete
        if complete and key[1] in self._unmasked:
            return None
        if key not in self._masks:
            window = self.types.windows[layer]
            if window is not None and self.seen > window and "flash" in str(self.types.config._attn_implementation):
                raise UnsupportedModelError(
                    f"layer {layer} slides a window of {window} tokens over {self.seen}, and flash attention would "
                    "count kept tokens only; use attn_implementation='sdpa'"
                )
            self._masks[key] = causal_mask(
                self.types,
                layer,
                hidden,
                self.keys_of(layer),
                self.cache,
                blocks=self.blocks,
                seen=self.seen,
                complete=complete,
            )
            if complete and self._masks[key] is None:
                self._unmasked.add(key[1])
        return self._masks[key]

    def rotary(self, layer: int, tables: Any) -> Any:
        """Shorten the layer's rotary tables (B or 1, T0, d) by the decoder stages so far."""
        key = self._key(layer)
        if key not in self._rotary:
            for start, plan in self.layer_plans:
                if start <= layer:  # where checkpointing runs an early layer again, later plans are known already
                    tables = tuple(plan.take(table) for table in tables)
            self._rotary[key] = tables
        return self._rotary[key]

    def _key(self, layer: int) -> tuple[int, str]:
        return self.group_of(layer), self.types.names[layer]
