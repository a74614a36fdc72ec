"""Inside a vision tower: on entering a layer its stages choose, and the sequence of patches becomes shorter.

Patches leave in cells: all patches that become one token together. Where cells are merged, each patch of one flows into
the patch at the same place of the other, and attention counts a patch as often as it stands for others. What comes out
of the tower is put back to the length that the model expects, with zeros where patches left, so that nothing behind it
has to know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vtc.adapters.base import TowerUnit
from vtc.core.actions import Action
from vtc.core.context import VisualContext
from vtc.core.observations import PatchPixels, TokenGrids
from vtc.core.packing import PackPlan
from vtc.core.selection import Selection
from vtc.core.signals import Signal
from vtc.core.sites import Site
from vtc.engine.plan import PlannedStage, no_merging_with_flash
from vtc.errors import UnsupportedMethodError, UnsupportedModelError

__all__ = ["TowerPass", "refuse_checkpointing"]

_BORDERS = {"cu_seqlens": "max_seqlen", "cu_seq_lens_q": "max_length_q", "cu_seq_lens_k": "max_length_k"}
"""How the arguments of a layer are called that say where packed sequences end, and how long the longest is."""

Values = Callable[[PlannedStage], Mapping[Signal, torch.Tensor]]
"""Signals that a stage requires, as values (C, M, ...) per patch of the whole sequence, without prefix tokens."""


class TowerPass:
    """One run of a tower that loses patches on the way.

    A tower takes C crops of T tokens each, the first `prefix` of which are no patches, or one sequence of S patches in
    which several images are packed; that is C = 1 crop of S here.

    Parameters
    ----------
    units : sequence of TowerUnit
        What selections are made of: crops, or images within the packed sequence.
    stages : mapping of layer to its stages
    prefix : int
        Tokens at the start of a crop that always stay.
    modality : str
    values : callable
        See `Values`.
    flash : bool
        Whether the tower's attention takes no mask, so that crops of one batch must keep equally many patches.

    Raises
    ------
    UnsupportedModelError
        Patches are to merge, and attention takes no mask.

    Attributes
    ----------
    survivors : dict of Site to BoolTensor (C, T)
        Tokens that are left behind each site.
    sizes : Tensor (C, T'), or None
        How many patches every current token stands for in attention; None while each stands for itself.
    spent : dict of Site to float
        Milliseconds that methods took.
    """

    def __init__(
        self,
        units: Sequence[TowerUnit],
        stages: Mapping[int, Sequence[PlannedStage]],
        prefix: int,
        modality: str,
        values: Values,
        *,
        flash: bool = False,
    ) -> None:
        self.units, self.stages, self.prefix, self.modality, self.values = units, stages, prefix, modality, values
        self.flash = flash
        merging = [stage for each in stages.values() for stage in each if stage.stage.action is Action.MERGE]
        if merging and flash:
            raise UnsupportedModelError(no_merging_with_flash(merging[0].selector.name, merging[0].site))
        self.survivors: dict[Site, torch.Tensor] = {}
        self.sizes: torch.Tensor | None = None
        self.spent: dict[Site, float] = {}
        self._loads: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # lengths of sequences, before and after
        self._kept = [torch.arange(len(unit.cells)) for unit in units]
        self._plans: list[tuple[int, PackPlan]] = []
        self._source = torch.empty(0, 0, dtype=torch.long)  # (C, T'): place of every current token at the beginning
        self._length = -1
        self._left = False
        self._shortened: dict[int, tuple[Any, Any]] = {}
        self._mask: torch.Tensor | None = None
        self._seen: dict[nn.Module, int] = {}  # tokens that an attention module has been called with so far

    def enter(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Drop patches on entering tower layer `layer`, and correct what the layer is called with.

        Returns
        -------
        The arguments of the layer; None if they stay as they are.

        Raises
        ------
        UnsupportedModelError
            The tower has run already; or crops keep different numbers of patches and its attention takes no mask.
        """
        if self._left:
            raise UnsupportedModelError(
                "the vision tower ran twice for one call of its encoder, of which only one can be followed; use "
                "at='decoder'"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        packed = hidden.dim() == 2
        rows = hidden[None] if packed else hidden
        if self._length < 0:
            self._length = rows.shape[1]
            self._source = torch.arange(self._length, device=rows.device).expand(len(rows), -1)
        for stage in self.stages.get(layer, ()):
            rows = self._drop(stage, layer, rows)
        named = next((name for name in _BORDERS if kwargs.get(name) is not None), None)
        before = torch.full((len(rows),), self._length, device=rows.device) if named is None else kwargs[named].diff()
        self._loads[layer] = before, before
        if not self._plans:
            return None
        kwargs = {**kwargs, **self._arguments(kwargs)}
        self._loads[layer] = before, (self._source >= 0).sum(dim=1) if named is None else kwargs[named].diff()
        if len(args) > 1 and isinstance(args[1], torch.Tensor):  # CLIP's and SigLIP's mask has no name
            args = (args[0], self._shorten_mask(args[1]), *args[2:])
        hidden = rows[0] if packed else rows
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def attention_bias(self, module: nn.Module, query: torch.Tensor) -> torch.Tensor | None:
        """Return what a call of an attention module adds to its logits, (C, 1, 1, M); None if nothing.

        That is the logarithm of the size of every token, so that one that stands for n counts n times; and minus
        infinity, nearly, for what only fills the rows of crops that keep fewer patches than others.
        """
        if self._mask is None and self.sizes is None:
            return None
        bias = torch.zeros(self._source.shape, dtype=query.dtype, device=query.device)
        if self.sizes is not None:
            bias = bias + self.sizes.to(torch.promote_types(query.dtype, torch.float32)).log().to(bias)
        if self._mask is not None:
            bias = bias.masked_fill(~self._mask.to(bias.device), torch.finfo(query.dtype).min)
        # The images and windows of a packed sequence come one by one.
        start, total = self._seen.get(module, 0), self._source.shape[1]
        self._seen[module] = (start + query.shape[2]) % total
        return bias[:, None, None, start : start + query.shape[2]]

    def restore_rows(self, values: torch.Tensor, layer: int) -> torch.Tensor:
        """Put values (C, T', ...) of the tokens behind layer `layer` back among all that came in, zeros elsewhere."""
        for start, plan in reversed(self._plans):
            if start <= layer:
                values = plan.scatter(values)
        return values

    def loads(self) -> dict[int, list[list[int]]]:
        """Return, for every layer that ran, tokens and the sum of squares of the lengths of their sequences.

        Returns
        -------
        dict of layer to [[tokens, squares] of all patches, [tokens, squares] of those that were left]
        """
        sums = [
            torch.stack([torch.stack([n.sum(), (n.long() ** 2).sum()]) for n in pair]) for pair in self._loads.values()
        ]
        return dict(zip(self._loads, torch.stack(sums).tolist(), strict=True)) if sums else {}

    def leave(self, output: Any) -> None:
        """Put the hidden states in the output of a tower back to full length: it has run."""
        self._left = True
        last = 1 << 30
        states = getattr(output, "hidden_states", None)
        if states is not None:  # of layer i - 1; the first is what layer 0 was given
            output.hidden_states = tuple(
                None if state is None else self._restored(state, max(i - 1, 0)) for i, state in enumerate(states)
            )
        state = getattr(output, "last_hidden_state", None)
        if state is not None:
            output.last_hidden_state = self._restored(state, last)

    def restore_cells(self, rows: torch.Tensor) -> torch.Tensor:
        """Put the tokens (N', D) that a packed tower makes of cells back among all N."""
        if not self._plans:
            return rows
        cell = self.units[0].cells.shape[1]
        index = self._source[0, ::cell] // cell
        return rows.new_zeros(self._length // cell, rows.shape[1]).index_copy(0, index, rows)

    # -- choosing ---------------------------------------------------------------------------------------------------

    def _drop(self, stage: PlannedStage, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Let a stage choose in every unit; return the tokens (C, T', D) that stay."""
        values = self.values(stage)
        place = self._places()
        keep = self._source >= 0
        for number, unit in enumerate(self.units):
            kept = self._kept[number]
            here = place[unit.crop, self.prefix + unit.cells[kept].to(place.device)]  # (N, p)
            began = time.perf_counter()
            context = self._context(stage, unit, kept, rows[unit.crop][here], values)
            selection = stage.selector.select(context.check())
            spent = 1e3 * (time.perf_counter() - began)
            self.spent[stage.site] = self.spent.get(stage.site, 0.0) + spent
            if selection.assign is not None:
                rows = self._merge(stage, selection, rows, unit.crop, here)
            gone = torch.ones(len(kept), dtype=torch.bool)
            gone[selection.keep.cpu()] = False
            keep[unit.crop, here[gone.to(here.device)].flatten()] = False
            self._kept[number] = kept[~gone]
        if not bool(keep.eq(self._source >= 0).all()):
            sizes = () if self.sizes is None else (self.sizes,)
            plan, packed, _ = PackPlan.pack(keep, [rows, self._source, *sizes], [1] * (2 + len(sizes)), side="right")
            rows, source = packed[:2]
            self._source = source.masked_fill(~plan.mask, -1)
            self.sizes = packed[2].masked_fill(~plan.mask, 1) if sizes else None
            self._plans.append((layer, plan))
            self._shortened = {}
            self._mask = None if bool(plan.mask.all()) else plan.mask
            if self._mask is not None and self.flash:
                raise UnsupportedModelError(
                    f"{stage.selector.name} kept different numbers of patches of the crops of a batch, for which flash "
                    "attention takes no mask; use attn_implementation='sdpa', or a method with a fixed budget"
                )
        left = self._places()[:, : self._length] >= 0
        self.survivors[stage.site] = left
        return rows

    def _merge(
        self, stage: PlannedStage, selection: Selection, rows: torch.Tensor, crop: int, here: torch.Tensor
    ) -> torch.Tensor:
        """Merge the cells at `here` (N, p) of a crop into those that stay, and add up their sizes.

        Returns
        -------
        Tensor (C, T', D)
            `rows` with merged tokens in the places of those that stay.
        """
        if stage.stage.action is not Action.MERGE:
            raise UnsupportedMethodError(
                f"{stage.selector.name} merged patches at {str(stage.site)!r} though its stage declares "
                f"{stage.stage.action}"
            )
        if self.sizes is None:
            self.sizes = torch.ones(rows.shape[:2], device=rows.device)
        anchors = here[selection.keep.to(here.device)]
        assign, weight = selection.matrix()  # (N, A)
        sizes = self.sizes[crop][here[:, 0]].to(assign.device)  # the patches of a cell have the same
        totals = Selection(selection.n, selection.keep, assign, torch.ones_like(weight)).merge(sizes)
        if selection.weight is None:  # the mean is over patches, however many tokens they are in
            weight = (sizes[:, None] / totals[assign.clamp(min=0)]).masked_fill(assign < 0, 0.0)
        merged = Selection(selection.n, selection.keep, assign, weight).merge(rows[crop][here])
        at = torch.full_like(anchors, crop)
        self.sizes = self.sizes.index_put((at, anchors), totals[:, None].to(self.sizes).expand_as(anchors))
        return rows.index_put((at, anchors), merged)

    @torch.no_grad()
    def _context(
        self,
        stage: PlannedStage,
        unit: TowerUnit,
        kept: torch.Tensor,
        patches: torch.Tensor,
        values: Mapping[Signal, torch.Tensor],
    ) -> VisualContext:
        """Show a stage the cells that are left of a unit; `patches` (N, p, D) are their hidden states."""
        whole = len(kept) == len(unit.cells)
        signals = {}
        for signal in stage.stage.requires:
            if signal.reads is TokenGrids:
                origin = TokenGrids((unit.grid,), patches.device)
                signals[signal] = signal.present(signal.compute(origin)[kept.to(patches.device)])
                continue
            value = values[signal]
            cells = (unit.inputs if signal.reads is PatchPixels else unit.cells)[kept].to(value.device)
            of_cells = value[unit.crop][cells]  # (N, p, ...)
            pooled = of_cells if signal.per_patch else of_cells.float().mean(dim=1).to(value.dtype)
            signals[signal] = signal.present(pooled)
        return VisualContext(
            features=patches.detach().mean(dim=1),
            budget=stage.budget(len(kept)),
            generator=torch.Generator().manual_seed(stage.config.seed),
            grids=(unit.grid,) if whole else ((1, 1, len(kept)),),
            modality=self.modality if unit.grid[0] > 1 else "image",
            site=stage.site,
            keep_ratio=stage.keep_ratio,
            structural=self.prefix,
            tokens_at_input=len(unit.cells),
            signals=signals,
        )

    def _places(self) -> torch.Tensor:
        """(C, T + 1): where every original token stands now, -1 for those that left; the last column is no token."""
        crops, now = self._source.shape
        places = self._source.new_full((crops, self._length + 1), -1)
        index = torch.where(self._source < 0, self._length, self._source)
        places.scatter_(1, index, torch.arange(now, device=index.device).expand(crops, -1))
        places[:, -1] = -1
        return places

    # -- arguments of layers ----------------------------------------------------------------------------------------

    def _arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return those keyword arguments of a layer that depend on which patches there are, without those that left."""
        changed: dict[str, Any] = {}
        tables = kwargs.get("position_embeddings")
        if isinstance(tables, tuple):
            changed["position_embeddings"] = tuple(self._once(table, self._shorten_table) for table in tables)
        for name, length in _BORDERS.items():
            borders = kwargs.get(name)
            if borders is None:
                continue
            changed[name] = shorter = self._once(borders, self.shorten_borders)
            longest = kwargs.get(length)
            if longest is not None:
                most = shorter.diff().max()
                changed[length] = most.to(longest) if isinstance(longest, torch.Tensor) else int(most)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor):
            changed["attention_mask"] = self._shorten_mask(mask)
        return changed

    def _once(self, value: torch.Tensor, shorten: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Shorten a value that is passed to every layer, once."""
        if id(value) not in self._shortened:
            self._shortened[id(value)] = value, shorten(value)
        return self._shortened[id(value)][1]

    def _shorten_table(self, table: torch.Tensor) -> torch.Tensor:
        return table[self._source[0].to(table.device)]

    def shorten_borders(self, borders: torch.Tensor) -> torch.Tensor:
        """Move the borders (S + 1,) of windows or images to where their patches are now; one that is empty is none."""
        stays = torch.zeros(self._length + 1, dtype=torch.long, device=borders.device)
        stays[self._source[0].to(borders.device) + 1] = 1
        return stays.cumsum(dim=0)[borders.long()].unique_consecutive().to(borders.dtype)

    def _shorten_mask(self, mask: torch.Tensor) -> torch.Tensor:
        index = self._source.clamp(min=0).to(mask.device)
        if mask.dim() == 2:
            return mask.expand(len(index), -1).gather(1, index)
        mask = mask.expand(len(index), -1, -1, -1)
        if mask.shape[2] > 1:
            mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return mask.gather(3, index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))

    def _restored(self, state: torch.Tensor, layer: int) -> torch.Tensor:
        rows = state[None] if state.dim() == 2 else state
        plans = [plan for start, plan in self._plans if start <= layer]
        if not plans or rows.shape[1] != plans[-1].mask.shape[1]:
            return state
        rows = self.restore_rows(rows, layer)
        return rows[0] if state.dim() == 2 else rows


def refuse_checkpointing(tower: nn.Module) -> None:
    """Raise UnsupportedModelError for a tower whose layers run again after the call, when nothing is known of it."""
    if tower.training and any(getattr(module, "gradient_checkpointing", False) for module in tower.modules()):
        raise UnsupportedModelError(
            "patches cannot leave a vision tower whose layers are checkpointed and run again later; switch gradient "
            "checkpointing off in the tower, or use at='decoder'"
        )
