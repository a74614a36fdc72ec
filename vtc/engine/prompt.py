"""The images and videos of one prompt: their columns, their tokens, and what the stages decided.

A prompt outlives one forward pass: it is read in chunks, repeated for beams, or fed again at every step where there is
no cache. Decisions are therefore made once per prompt and looked up afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vtc.adapters.base import Adapter, Layout
from vtc.config import CompressionConfig
from vtc.core.grids import Grid
from vtc.core.observations import TokenGrids
from vtc.core.regions import Region, given_regions
from vtc.core.selection import Selection
from vtc.core.signals import Signal
from vtc.core.sites import BeforeDecoder, CacheAfterPrefill, DecoderLayer, Pixels, Site, VisionLayer
from vtc.engine.encoder import Encoded
from vtc.errors import InputError

__all__ = ["Prompt", "Segment"]

_BEFORE = BeforeDecoder()
_PIXELS = Pixels()


@dataclass(eq=False)
class Segment:
    """One image or video of a prompt while stages work on it.

    Attributes
    ----------
    row, index, modality
        Batch row, order among the images and videos of the row, "image" or "video".
    columns
        (n,) its positions in the prompt.
    grids
        Views of the tokens that are kept, in token order.
    structural
        (n,) bool: newlines and separators, which no method scores.
    features
        (K, D) embeddings of the kept tokens, merged ones included.
    signals
        Values per kept token (K, ...), not yet in the form that methods see.
    text_signals
        Values of the text of the prompt that stages inside the language model read.
    kept
        (K,) scorable tokens that no stage has dropped so far, as indices within the segment.
    survivors
        (n,) bool: tokens that were left behind each site in the tower.
    resampled
        The grid that those left at the pixels form, where the picture was made smaller there.
    encoded
        `kept` as it was when the tower had run.
    other_visuals
        How many other images and videos the row has.
    merged
        Whether a stage has merged tokens, or put new ones in their place.
    anchors, anchor_features
        `kept` and `features` as the language model gets them, before stages inside it drop some.
    new_text
        (T, D) embeddings of the text of the row, where a stage has fused tokens into it.
    selections
        What the stages answered so far.
    memories
        What methods remember of the picture: the configuration, the positions in the prompt of the tokens that it kept,
        and the tensors.
    """

    row: int
    index: int
    modality: str
    columns: torch.Tensor
    grids: tuple[Grid, ...]
    structural: torch.Tensor
    features: torch.Tensor
    signals: dict[Signal, torch.Tensor]
    kept: torch.Tensor
    survivors: dict[Site, torch.Tensor] = field(default_factory=dict)
    resampled: Grid | None = None
    encoded: torch.Tensor = field(init=False)
    text_signals: dict[Signal, torch.Tensor] = field(default_factory=dict)
    other_visuals: int = 0
    merged: bool = False
    anchors: torch.Tensor | None = None
    anchor_features: torch.Tensor | None = None
    new_text: torch.Tensor | None = None
    selections: list[tuple[Site, Selection]] = field(default_factory=list)
    memories: list[tuple[CompressionConfig, torch.Tensor, Mapping[str, torch.Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.encoded = self.kept

    @property
    def tokens_at_input(self) -> int:
        """Scorable tokens that came, or will come, to the language model."""
        kept = [selection.k for site, selection in self.selections if isinstance(site, BeforeDecoder)]
        return kept[-1] if kept else len(self.encoded)

    def add_grid_signals(
        self, signals: Sequence[Signal], region: Region | None = None, marked: bool = False, fit: str = "stretch"
    ) -> None:
        """Compute those of `signals` that follow from the grids, while all tokens are there."""
        raw = TokenGrids(self.grids, self.features.device, region, marked, fit)
        self.signals |= {signal: signal.compute(raw) for signal in signals if signal.reads is TokenGrids}

    def leave_tower(self) -> None:
        """Forget the tokens that left in the tower."""
        for site, survivors in self.survivors.items():
            left = survivors[self.kept]
            keep = left.nonzero()[:, 0]
            self.selections.append((site, Selection(len(left), keep)))
            if len(keep) == len(left):
                continue
            grid = (1, 1, len(keep)) if self.resampled is None else self.resampled
            self.kept = self.kept[keep]
            self.grids = (grid if math.prod(grid) == len(keep) else (1, 1, len(keep)),)
            self.features = self.features[keep.to(self.features.device)]
            self.signals = {signal: value[keep.to(value.device)] for signal, value in self.signals.items()}
        self.encoded = self.kept

    def apply(self, site: Site, selection: Selection) -> None:
        """Keep what `selection`, which was made from the tokens kept so far, kept."""
        self.selections.append((site, selection))
        before = isinstance(site, BeforeDecoder)
        if before:
            self.merged |= selection.assign is not None or selection.features is not None
            self.features = self.anchor_features = selection.tokens(self.features)
            self.new_text = self.new_text if selection.text is None else selection.text
        else:
            self.features = self.features[selection.keep.to(self.features.device)]
        keep = selection.keep.to(self.kept.device)
        self.signals = {signal: value[keep] for signal, value in self.signals.items()}
        self.kept = self.kept[keep]
        if before:
            self.anchors = self.kept
        self.grids = self.grids if selection.k == selection.n else ((1, 1, selection.k),)

    def entering(self, site: Site) -> tuple[torch.Tensor, Selection]:
        """Return the scorable tokens (K,) that entered the stage at `site` behind the tower, and what it answered."""
        kept = self.encoded
        for decided, selection in self.selections:
            if decided == site:
                return kept, selection
            if not isinstance(decided, (Pixels, VisionLayer)):  # `encoded` is what these left
                kept = kept[selection.keep.to(kept.device)]
        raise KeyError(site)

    def merge(self, rows: torch.Tensor) -> torch.Tensor:
        """Reduce the embeddings of the scorable tokens as the stages before the language model reduced the features."""
        for site, selection in self.selections:
            rows = selection.tokens(rows) if isinstance(site, BeforeDecoder) else rows
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
    structural : {"keep", "drop"}
    signals : sequence of Signal
        Those that follow from grids are computed here.
    answered : BoolTensor (S, P), optional
        Which columns are no padding, where an answer is generated to this prompt, so that its last token has to stay.

    Raises
    ------
    InputError
        Placeholders and features do not fit each other, or regions and pictures.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        offset: int,
        encoded: Mapping[str, Encoded],
        adapter: Adapter,
        structural: str,
        signals: Sequence[Signal] = (),
        answered: torch.Tensor | None = None,
    ) -> None:
        self.ids, self.offset, self.answered = ids, offset, answered
        self.rows, self.columns = ids.shape
        counted = [call.tower_flops for call in encoded.values() if call.tower_flops is not None]
        self.tower_flops = (sum(b for b, _ in counted), sum(a for _, a in counted)) if counted else None
        self.spent: dict[Site, float] = {}  # milliseconds that methods took
        self.segments: list[Segment] = []
        self.visual: torch.Tensor = torch.zeros_like(ids, dtype=torch.bool)
        self.valid = torch.zeros_like(self.visual)  # filled as the columns come
        for modality, call in encoded.items():
            for site, milliseconds in call.spent.items():
                self.spend(site, milliseconds)
            where = adapter.placeholders(ids, modality)
            self.visual |= where
            self.segments += _cut(where, call)
        order: dict[int, int] = {}
        for segment in sorted(self.segments, key=lambda s: (s.row, int(s.columns[0]))):
            segment.index = order[segment.row] = order.get(segment.row, -1) + 1
        self.segments.sort(key=lambda s: (s.row, s.index))
        marked = _marked(self.segments, signals)
        for number, segment in enumerate(self.segments):
            segment.other_visuals = order[segment.row]
            region = None if marked is None else marked[number]
            segment.add_grid_signals(signals, region, marked is not None, adapter.fit(segment.modality))
        self.grids = [segment.grids for segment in self.segments]
        for segment in self.segments:
            segment.leave_tower()
        first = torch.ones_like(self.visual)
        if structural == "drop":
            for segment in self.segments:
                first[segment.row, segment.columns[segment.structural]] = False
        self._all = first
        self.stored: list[torch.Tensor] | None = None  # per layer (S, G, P'): columns whose entries a method left
        self._keep: dict[Site, torch.Tensor] = {}  # in the order of the sites
        for site in dict.fromkeys(site for segment in self.segments for site in segment.survivors):
            self._keep[site] = first.clone()
            for segment in self.segments:
                left = segment.survivors.get(site)
                if left is not None:
                    self._keep[site][segment.row, segment.columns[~left]] = False

    def spend(self, site: Site, milliseconds: float) -> None:
        """Note how long a method took at `site`."""
        self.spent[site] = self.spent.get(site, 0.0) + milliseconds

    def mark_seen(self, source_index: torch.Tensor) -> None:
        """Note which columns of the conversation, (S, T) with -1 for padding, really came."""
        here = source_index - self.offset
        rows, at = torch.where((here >= 0) & (here < self.columns) & (source_index >= 0))
        self.valid[rows, here[rows, at]] = True

    def decided(self, site: Site = _BEFORE) -> bool:
        """Tell whether the stages at `site` have chosen."""
        return site in self._keep

    def keep_at(self, site: Site = _BEFORE) -> torch.Tensor:
        """Return (S, P) bool: columns that the stages up to and including `site` keep."""
        earlier = [keep for decided, keep in self._keep.items() if decided.order <= site.order]
        return earlier[-1] if earlier else self._all

    def keep_at_layer(self, layer: int) -> torch.Tensor:
        """Return (S, P) bool: columns that decoder layer `layer` sees."""
        return self.keep_at(DecoderLayer(layer) if layer else _BEFORE)

    def decide(self, site: Site = _BEFORE) -> None:
        """Write down what the segments keep, now that the stages at `site` have been applied to all of them.

        Raises
        ------
        InputError
            An answer is to be generated, and the token that it is predicted from was dropped.
        """
        keep = self.keep_at(site).clone()
        for segment in self.segments:
            # The newlines of an image of which nothing is left separate nothing.
            gone = segment.columns if not len(segment.kept) else segment.columns[~segment.structural]
            keep[segment.row, gone] = False
            keep[segment.row, segment.columns[segment.kept]] = True
        self._keep[site] = keep
        if self.answered is not None and self.segments and not isinstance(site, CacheAfterPrefill):
            order = torch.arange(self.columns, device=keep.device)
            last = order.masked_fill(~self.answered, -1).argmax(dim=1)
            gone = self.visual.gather(1, last[:, None])[:, 0] & ~keep.gather(1, last[:, None])[:, 0]
            for row in gone.nonzero()[:, 0].tolist():
                raise InputError(
                    f"row {row} of the prompt ends with an image or video whose last token was dropped at "
                    f"{str(site)!r}: nothing is left to predict the answer from; put text behind it"
                )

    def moves(self) -> torch.Tensor:
        """Compute how far (t, h, w) positions move down if they are to be those of a prompt with the smaller pictures.

        A picture of h x w tokens that begins at position p takes p to p + h - 1 on one axis and p to p + w - 1 on
        another, and what follows begins at p + max(h, w). So does every frame that text is put in front of.

        Returns
        -------
        LongTensor (3, S, P + 1)
            Of columns that stay; the last one is what comes behind the prompt.
        """
        moves = torch.zeros(3, self.rows, self.columns + 1, dtype=torch.long, device=self.ids.device)
        saved = torch.zeros_like(moves[0])  # behind every picture, how many positions less it takes
        for segment, ((_, h, w),) in zip(self.segments, self.grids, strict=True):
            left = segment.survivors[_PIXELS]
            place = torch.arange(len(left), device=left.device) % (h * w)
            for axis, (line, size) in enumerate(((place // w, h), (place % w, w)), start=1):
                stays = torch.zeros(size, dtype=torch.long, device=left.device)
                stays[line[left]] = 1
                moves[axis, segment.row, segment.columns] = (1 - stays).cumsum(dim=0)[line]
            smaller = max(segment.resampled[1:]) if segment.resampled is not None else max(h, w)
            run = torch.cat([segment.columns.new_zeros(1), (segment.columns.diff() != 1).long().cumsum(dim=0)])
            for part in run.unique().tolist():
                here = run == part
                takes = smaller if bool(left[here].any()) else 0
                saved[segment.row, segment.columns[here][-1] + 1] = max(h, w) - takes
        return moves + saved.cumsum(dim=1)

    def kept(self, segment: Segment) -> torch.Tensor:
        """Return the indices within the segment of the tokens that all stages kept, structural ones included."""
        keep = list(self._keep.values())[-1] if self._keep else self._all
        return keep[segment.row, segment.columns].nonzero()[:, 0]

    def rows_with_pictures(self) -> torch.Tensor:
        """Return (S,) bool, on the CPU: rows that have an image or a video."""
        rows = {segment.row for segment in self.segments}
        return torch.tensor([row in rows for row in range(self.rows)])

    def segment_of_columns(self) -> torch.Tensor:
        """Return (S, P) long: number of the segment whose token a column is, -1 for text, newlines and separators."""
        numbers = torch.full_like(self.ids, -1)
        for number, segment in enumerate(self.segments):
            numbers[segment.row, segment.columns[~segment.structural]] = number
        return numbers

    def release(self) -> None:
        """Free the features; the decisions stay for the report."""
        for segment in self.segments:
            segment.features = segment.features.new_empty(0)
            segment.selections = [(site, selection.without_features()) for site, selection in segment.selections]
            segment.anchor_features = segment.new_text = None
            segment.memories = []
            segment.signals, segment.text_signals = {}, {}


def _marked(segments: Sequence[Segment], signals: Sequence[Signal]) -> tuple[Region | None, ...] | None:
    """Return the region of every segment, if the user has given some, and check that they fit."""
    given = given_regions()
    if given is None or not segments:
        return None
    if not any(signal.reads_regions for signal in signals):
        raise InputError("vtc.regions was given regions, but no method of this compression reads them; try pixelrefer")
    if len(given) != len(segments):
        raise InputError(
            f"vtc.regions was given {len(given)} regions, but the prompt has {len(segments)} pictures; give one entry "
            "for each, None for the whole picture"
        )
    return given


def _cut(where: torch.Tensor, encoded: Encoded) -> Iterator[Segment]:
    """Yield the segments of one modality, row by row; `where` (S, P) marks its placeholders."""
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
            survivors = {site: left[rows].to(columns.device) for site, left in encoded.survivors.items()}
            scorable = (~structural).nonzero()[:, 0]
            yield Segment(
                row=row,
                index=-1,
                modality=encoded.modality,
                columns=columns[:length],
                grids=grids,
                structural=structural.to(columns.device),
                features=encoded.features[rows][scorable],
                signals={signal: value[rows][scorable] for signal, value in encoded.signals.items()},
                kept=scorable.to(columns.device),
                survivors=survivors,
                resampled=None if encoded.resampled is None else encoded.resampled[part - 1],
            )
            columns, start = columns[length:], start + length


def _lengths(columns: torch.Tensor, layout: Layout, part: int, modality: str, row: int) -> list[int]:
    """Return the lengths of the segments of one row."""
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
