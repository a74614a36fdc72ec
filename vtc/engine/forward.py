"""One pass through the language model: which tokens are in it now, and what each decoder layer must be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtc.core.selection import PackPlan
from vtc.engine.cache import CacheRecord, Lease, compacted, record_of
from vtc.engine.masks import LayerKinds, causal_mask
from vtc.engine.prompt import Prompt
from vtc.errors import UnsupportedModelError


class Run:
    """State of one forward pass over B rows of T current tokens.

    Attributes
    ----------
    columns : LongTensor (B, T)
        Where every current token stands in the uncompressed conversation; -1 for padding.
    groups : list of (start_layer, LongTensor (B, P))
        As in `CacheRecord`, this pass's tokens included.
    packed : PackPlan or None
        What was packed before the first layer.
    steps : list of (layer, PackPlan)
        What was packed on entering decoder layers.
    prompt : Prompt or None
        The prompt, if this pass brings visual tokens; `source` (B,) has the prompt row of every row.
    """

    def __init__(self, kinds: LayerKinds, cache: Any, columns: torch.Tensor, past: int, history: CacheRecord) -> None:
        self.kinds, self.cache, self.past = kinds, cache, past
        self.history = CacheRecord(history.logical, list(history.groups), history.shift)  # `write_record` moves on
        self.columns = columns
        self.length = columns.shape[1]
        self.seen = past + self.length
        self.groups = [(start, torch.cat([keys, columns], dim=1)) for start, keys in history.groups]
        self.blocks: torch.Tensor | None = None
        self.packed: PackPlan | None = None
        self.steps: list[tuple[int, PackPlan]] = []
        self.prompt: Prompt | None = None
        self.source: torch.Tensor | None = None
        self.shift = history.shift
        self._masks: dict[tuple[int, str], Any] = {}
        self._rotary: dict[tuple[int, str], Any] = {}

    # -- tokens ---------------------------------------------------------------------------------------------------

    @property
    def valid(self) -> torch.Tensor:
        """(B, T): current tokens that are no padding."""
        return self.columns >= 0

    @property
    def touched(self) -> bool:
        """Whether anything differs from what the model would do by itself."""
        return self.packed is not None or bool(self.steps) or record_of(self.cache) is not None

    def read(self, prompt: Prompt) -> None:
        """Say which prompt the current tokens belong to."""
        repeats = len(self.columns) // prompt.rows
        self.prompt = prompt
        self.source = torch.arange(len(self.columns), device=self.columns.device) // repeats
        prompt.see(self.columns[::repeats])

    def prompt_columns(self) -> torch.Tensor:
        """(B, T): column of every current token within the prompt, -1 outside."""
        prompt = self._prompt()
        columns = self.columns - prompt.offset
        return torch.where((columns >= 0) & (columns < prompt.columns) & self.valid, columns, -1)

    def brings_all(self) -> bool:
        """Whether this pass reads the prompt in one piece."""
        prompt = self._prompt()
        return self.past <= prompt.offset and self.seen >= prompt.offset + prompt.columns

    def places(self, row: int, columns: torch.Tensor) -> torch.Tensor:
        """Index among the current tokens of row `row` for each of the prompt's `columns`, -1 where it is not here."""
        at = torch.full((self._prompt().columns + 1,), -1, dtype=torch.long, device=self.columns.device)
        here = self.prompt_columns()[row]
        at[here] = torch.arange(len(here), device=at.device)
        at[-1] = -1
        return at[columns]

    def kept(self, keep: torch.Tensor) -> torch.Tensor:
        """(B, T): current tokens that a decision about the prompt (S, P) keeps."""
        columns = self.prompt_columns()
        if self.source is None:
            raise RuntimeError("no prompt was read")
        return self.valid & ((columns < 0) | keep[self.source[:, None], columns.clamp(min=0)])

    def _prompt(self) -> Prompt:
        if self.prompt is None:
            raise RuntimeError("no prompt was read")
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
        self.groups = [(start, torch.cat([keys, self.columns], dim=1)) for start, keys in self.history.groups]
        return packed, rows

    def step(self, layer: int, keep: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Drop tokens on entering decoder layer `layer`; earlier layers keep theirs. `hidden` without them."""
        plan, (hidden,), _ = self._pack(keep, [hidden], [1])
        self.steps.append((layer, plan))
        before = dict(self.groups)
        starts = sorted({start for start, _ in self.history.groups} | before.keys() | {layer})
        self.groups = [
            (start, before[start] if start < layer else torch.cat([self.history.keys_of(start), self.columns], dim=1))
            for start in starts
        ]
        self._masks, self._rotary = {}, {}
        return hidden

    def _pack(
        self,
        keep: torch.Tensor,
        planes: Sequence[torch.Tensor],
        dims: Sequence[int],
        marks: torch.Tensor | None = None,
        marked: Sequence[torch.Tensor] = (),
    ) -> tuple[PackPlan, list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Everything that the tokens carry, in one operation: the given and what is kept here."""
        own = [self.columns] if self.blocks is None else [self.columns, self.blocks]
        plan, packed, rows = PackPlan.pack(keep, [*planes, *own], [*dims, *[1] * len(own)], marks=marks, marked=marked)
        self.columns, *blocks = (plane.masked_fill(~plan.mask, -1) for plane in packed[len(planes) :])
        self.blocks = blocks[0] if blocks else None
        return plan, list(packed[: len(planes)]), rows

    def write_record(self, lease: Lease, shift: torch.Tensor | None) -> None:
        """Leave behind on the cache what later passes need to know."""
        self.shift = shift
        if self.cache is not None:
            record = compacted(self.cache)
            record.lease, record.shift = lease, shift
            record.logical, record.groups = self.seen, list(self.groups)

    def valid_keys(self, layer: int) -> torch.Tensor:
        """(B, P): keys of a layer that are no padding."""
        return self.keys_of(layer) >= 0

    @property
    def slides(self) -> bool:
        """Whether some layer's window is shorter than what was seen."""
        return self.kinds.shortest is not None and self.kinds.shortest < self.seen

    def needs_mask(self, layer: int) -> bool:
        """Whether the mask that the language model makes for all layers is wrong for this one."""
        window = self.kinds.windows[layer]
        return self._key(layer)[0] > 0 or (window is not None and window < self.seen)

    def scatter(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states back at their places among the tokens that came in, zeros where tokens were dropped."""
        plans = [plan for _, plan in reversed(self.steps)]
        for plan in [*plans, self.packed] if self.packed is not None else plans:
            hidden = plan.scatter(hidden)
        return hidden

    def thin(self, where: torch.Tensor, plane: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks (B, T0) of visual tokens and one row per mark, after the decoder stages so far."""
        for _, plan in self.steps:
            where, plane = thin(plan, where, plane)
        return where, plane

    # -- what a layer is told -------------------------------------------------------------------------------------

    def keys_of(self, layer: int) -> torch.Tensor:
        """(B, P): where the keys of a layer stand in the conversation, current ones included."""
        return next(keys for start, keys in reversed(self.groups) if start <= layer)

    def mask(self, layer: int, hidden: torch.Tensor) -> Any:
        """The layer's attention mask."""
        key = self._key(layer)
        if key not in self._masks:
            self._masks[key] = layer_mask(self, layer, hidden)
        return self._masks[key]

    def rotary(self, layer: int, tables: Any) -> Any:
        """The layer's rotary tables (B or 1, T0, d), after the decoder stages so far."""
        key = self._key(layer)
        if key not in self._rotary:
            for step, plan in self.steps:
                if step <= layer:  # where checkpointing runs an early layer again, later steps are known already
                    tables = tuple(plan.take(table) for table in tables)
            self._rotary[key] = tables
        return self._rotary[key]

    def _key(self, layer: int) -> tuple[int, str]:
        return max(start for start, _ in self.groups if start <= layer), self.kinds.names[layer]


def layer_mask(run: Run, layer: int, hidden: torch.Tensor) -> Any:
    """Build one layer's mask.

    Raises
    ------
    UnsupportedModelError
        The kernel counts a window in stored tokens, of which there are fewer than were seen.
    """
    window = run.kinds.windows[layer]
    if window is not None and run.seen > window and "flash" in str(run.kinds.config._attn_implementation):
        raise UnsupportedModelError(
            f"layer {layer} slides a window of {window} tokens over {run.seen}, and flash attention would count kept "
            "tokens only; use attn_implementation='sdpa'"
        )
    return causal_mask(run.kinds, layer, hidden, run.keys_of(layer), run.cache, blocks=run.blocks, seen=run.seen)


def thin(plan: PackPlan, where: torch.Tensor, plane: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Marks (B, L) and one row of `plane` per mark, as a plan packs them."""
    kept = plan.scatter(plan.mask)[where.to(plan.mask.device)]
    return plan.take(where) & plan.mask.to(where.device), plane[kept.to(plane.device)]
