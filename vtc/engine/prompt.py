"""Which column of a prompt is which token of which image, and what the stages decided about it.

A prompt outlives one forward pass: it is read in chunks, repeated for beams, or fed again at every step where there is
no cache. Decisions are therefore made once per prompt and looked up afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from vtc.adapters.base import Adapter, Layout
from vtc.core.context import Grid, Need
from vtc.core.selection import Selection
from vtc.errors import InputError


@dataclass(eq=False)
class Encoded:
    """One call of an encoder: feature rows (total, D), how they fall into segments, and what selectors asked for."""

    modality: str
    features: torch.Tensor
    layout: Layout
    needs: dict[Need, torch.Tensor]  # per feature row: (total, ...)


@dataclass(eq=False)
class Segment:
    """One image or video of the prompt while stages work on it.

    `columns` (n,) are its positions in the prompt, `alive` (K,) the scorable tokens that no stage has dropped yet, as
    indices within the segment, `features` (K, D) their embeddings, merged ones included. `companions` counts the other
    images and videos of the row. `anchors` and `anchor_features` are tokens and embeddings as the language model got
    them, before stages inside it dropped some.
    """

    row: int
    index: int
    modality: str
    columns: torch.Tensor
    grids: tuple[Grid, ...]
    structural: torch.Tensor
    features: torch.Tensor
    needs: dict[Need, torch.Tensor]
    alive: torch.Tensor
    companions: int = 0
    merged: bool = False
    anchors: torch.Tensor | None = None
    anchor_features: torch.Tensor | None = None
    selections: list[tuple[int | None, Selection]] = field(default_factory=list)

    @property
    def entered(self) -> int:
        """Scorable tokens that came, or will come, to the language model."""
        kept = [selection.k for layer, selection in self.selections if layer is None]
        return kept[-1] if kept else int((~self.structural).sum())

    def apply(self, layer: int | None, selection: Selection) -> None:
        """Keep what `selection`, which speaks about the tokens alive now, kept."""
        self.selections.append((layer, selection))
        if layer is None:
            self.merged |= selection.assign is not None
            self.features = self.anchor_features = selection.merge(self.features)
        else:
            self.features = self.features[selection.keep.to(self.features.device)]
        keep = selection.keep.to(self.alive.device)
        self.needs = {need: value[keep] for need, value in self.needs.items()}
        self.alive = self.alive[keep]
        if layer is None:
            self.anchors = self.alive
        self.grids = self.grids if selection.k == selection.n else ((1, 1, selection.k),)

    def told(self, need: Need) -> torch.Tensor:
        """What was read for `need`, for the tokens alive now, as a context has it."""
        value = self.needs[need]
        if need in (Need.ENTROPY, Need.ORIGIN):
            return value
        if need is Need.CONTEXT_RELEVANCE:  # (N,) of the last layer
            return value[:, -1, 0]
        # (N, d) of the last layer for keys, (layers, heads, N) for attention.
        return value[:, -1] if need is Need.KEYS else value.permute(1, 2, 0)

    def merge(self, rows: torch.Tensor) -> torch.Tensor:
        """Reduce any values of the scorable tokens as the stages before the language model reduced the features."""
        for layer, selection in self.selections:
            rows = selection.merge(rows) if layer is None else rows
        return rows


class Prompt:
    """The images and videos of one prompt of S rows and P columns.

    Parameters
    ----------
    ids : LongTensor (S, P)
        Token ids before any repetition for beams.
    offset : int
        Tokens of the conversation that came before column 0.
    encoded : mapping of modality to Encoded
    adapter : Adapter

    Raises
    ------
    InputError
        Placeholders and features do not fit each other.
    """

    def __init__(
        self, ids: torch.Tensor, offset: int, encoded: Mapping[str, Encoded], adapter: Adapter, structural: str
    ) -> None:
        self.offset = offset
        self.rows, self.columns = ids.shape
        self.segments: list[Segment] = []
        self.visual: torch.Tensor = torch.zeros_like(ids, dtype=torch.bool)
        self.valid = torch.zeros_like(self.visual)  # filled as the columns come
        for modality, call in encoded.items():
            where = adapter.placeholders(ids, modality)
            self.visual |= where
            self.segments += _cut(where, call)
        order: dict[int, int] = {}
        for segment in sorted(self.segments, key=lambda s: (s.row, int(s.columns[0]))):
            segment.index = order[segment.row] = order.get(segment.row, -1) + 1
        for segment in self.segments:
            segment.companions = order[segment.row]
        self.segments.sort(key=lambda s: (s.row, s.index))
        self.grids = [segment.grids for segment in self.segments]
        first = torch.ones_like(self.visual)
        if structural == "drop":
            for segment in self.segments:
                first[segment.row, segment.columns[segment.structural]] = False
        self._keep: dict[int, torch.Tensor] = {-1: first}

    def see(self, columns: torch.Tensor) -> None:
        """Note which columns of the conversation, (S, T) with -1 for padding, really came."""
        here = columns - self.offset
        rows, at = torch.where((here >= 0) & (here < self.columns) & (columns >= 0))
        self.valid[rows, here[rows, at]] = True

    def decided(self, layer: int | None) -> bool:
        """Whether the stage at `layer` has been here."""
        return _key(layer) in self._keep and (layer is not None or self._before_done)

    _before_done = False

    def keep_at(self, layer: int | None) -> torch.Tensor:
        """(S, P): columns that the stages up to and including `layer` keep."""
        return self._keep[max(key for key in self._keep if key <= _key(layer))]

    def decide(self, layer: int | None) -> None:
        """Write down what the segments keep, now that the stage at `layer` has been applied to all of them."""
        keep = self.keep_at(layer).clone()
        for segment in self.segments:
            # The newlines of an image of which nothing is left separate nothing.
            gone = segment.columns if not len(segment.alive) else segment.columns[~segment.structural]
            keep[segment.row, gone] = False
            keep[segment.row, segment.columns[segment.alive]] = True
        self._keep[_key(layer)] = keep
        self._before_done |= layer is None

    def kept(self, segment: Segment) -> torch.Tensor:
        """Indices within the segment of the tokens that all stages kept, structural ones included."""
        return self._keep[max(self._keep)][segment.row, segment.columns].nonzero()[:, 0]

    def release(self) -> None:
        """Let go of the features; the decisions stay for the report."""
        for segment in self.segments:
            segment.features = segment.features.new_empty(0)
            segment.anchor_features = None
            segment.needs = {}


def _key(layer: int | None) -> int:
    return -1 if layer is None else layer


def _cut(where: torch.Tensor, encoded: Encoded) -> Iterator[Segment]:
    """Segments of one modality, row by row; `where` (S, P) marks its placeholders."""
    layout, total = encoded.layout, encoded.features.shape[0]
    found = int(where.sum())
    if found != total:
        raise InputError(
            f"the prompt has {found} {encoded.modality} placeholders, but the encoder gave {total} features; "
            "pass the ids and the pixels that the processor made together"
        )
    start = part = 0
    for row in range(where.shape[0]):
        columns = where[row].nonzero()[:, 0]
        for length in _lengths(columns, layout, part, encoded.modality, row):
            if layout.lengths is None:
                grids = layout.grids[0] * (length // layout.unit)
            else:
                grids = layout.grids[part]
                part += 1
            rows = slice(start, start + length)
            structural = layout.structural[rows]
            scorable = (~structural).nonzero()[:, 0]
            yield Segment(
                row=row,
                index=-1,
                modality=encoded.modality,
                columns=columns[:length],
                grids=grids,
                structural=structural.to(columns.device),
                features=encoded.features[rows][scorable],
                needs={need: value[rows][scorable] for need, value in encoded.needs.items()},
                alive=scorable.to(columns.device),
            )
            columns, start = columns[length:], start + length


def _lengths(columns: torch.Tensor, layout: Layout, part: int, modality: str, row: int) -> list[int]:
    """How the placeholders of one row fall into segments."""
    if layout.lengths is None:
        breaks = (columns.diff() != 1).nonzero()[:, 0] + 1
        runs = torch.tensor([0, *breaks.tolist(), len(columns)]).diff().tolist() if len(columns) else []
        for run in runs:
            if run % layout.unit:
                raise InputError(f"row {row}: a run of {run} {modality} placeholders is no multiple of {layout.unit}")
        return runs
    lengths: list[int] = []
    left = len(columns)
    while left > 0 and part + len(lengths) < len(layout.lengths):
        lengths.append(layout.lengths[part + len(lengths)])
        left -= lengths[-1]
    if left != 0:
        raise InputError(
            f"row {row}: {len(columns)} {modality} placeholders do not fall into whole {modality}s {lengths}"
        )
    return lengths
