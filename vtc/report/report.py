"""The report of one compressed call: tokens kept, arithmetic and cache saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vtc._version import __version__
from vtc.errors import UnsupportedModelError
from vtc.report.flops import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtc.config import CompressionConfig
    from vtc.core.selection import Selection
    from vtc.core.sites import Site


_FLOPS = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True, eq=False)
class SegmentReport:
    """One image or one video of the last prefill.

    Attributes
    ----------
    row : int
        Row of the batch.
    index : int
        Order among the row's images and videos.
    modality : str
        "image" or "video".
    tokens_before : int
        Tokens the language model would have seen, structural ones (newlines, separators) included.
    tokens_after : int
        Tokens that remain after the last stage, structural ones included.
    structural : int
        Structural tokens among `tokens_before`.
    grids : tuple of (int, int, int)
        (t, h, w) of every view, in token order.
    selections : tuple of (Site, Selection)
        Stage by stage, the site and the selection made there. Each selection indexes the scorable tokens that entered
        its stage.
    kept : torch.Tensor
        (tokens_after,) long, ascending: the indices within the segment of the tokens that remain after the last stage.
        Where a method chooses per decoder layer or head at the cache: of those that some layer and head still stores.
    """

    row: int
    index: int
    modality: str
    tokens_before: int
    tokens_after: int
    structural: int
    grids: tuple[tuple[int, int, int], ...]
    selections: tuple[tuple[Site, Selection], ...]
    kept: torch.Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return the segment as plain JSON types."""
        return {
            "row": self.row,
            "index": self.index,
            "modality": self.modality,
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "structural": self.structural,
            "grids": [list(grid) for grid in self.grids],
            "selections": [{"site": str(site), **selection.to_dict()} for site, selection in self.selections],
            "kept": self.kept.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Report:
    """Tokens, arithmetic and cache of the last compressed prefill, compared with the same prefill uncompressed.

    Built by :meth:`build`. Counts are of real tokens: padding is left out. FLOPs follow the conventions of
    :mod:`vtc.report.flops` (one MAC is two FLOPs, the head once per row, without vision tower and projector).

    Attributes
    ----------
    configs : tuple of CompressionConfig
        The stages, in order.
    model_type : str
        `config.model_type` of the whole model.
    text_model_type : str
        `config.model_type` of its decoder.
    segments : tuple of SegmentReport
    lengths_before : tuple of int
        (B,) tokens per row, text and visual, as the prompt had them.
    lengths_per_layer : tuple of tuple of int
        (L, B) tokens per row in every decoder layer.
    flops_before, flops_after : tuple of int or None
        (L,) prefill FLOPs of every decoder layer, all rows together; None where the decoder's formula is not known.
    head_flops : int or None
        FLOPs of the language-model head, all rows together; the same with and without compression.
    kv_bytes_before, kv_bytes_after : tuple of int or None
        (L,) bytes of keys and values that the prefill leaves in every layer's dynamic cache, all rows together.
    flops_note : str or None
        Why FLOPs and KV bytes are None.
    spent : tuple of (Site, float)
        Wall-clock milliseconds that methods took at each site.
    tower_flops_before, tower_flops_after : int or None
        FLOPs of the layers of the vision tower, all rows together; None where no stage works inside it.
    stored_per_layer : tuple of tuple of int, or None
        (L, B) tokens per row whose keys and values stay in the cache of every layer; None where no stage works there.
    entries : tuple of torch.Tensor, or None
        (L,) tensors (B, G, P) long: columns of the prompt that a layer's cache stores, for all heads (G = 1) or for
        each, -1 for padding and for what is not of this prompt; None where no method chooses layer by layer.
    scope : str or None
        Which entries such a method may evict: those of "visual" tokens, or of "all".
    probed_layers : int
        Decoder layers that read the whole prompt once more, to choose by; `flops_after` counts them.
    dtype : torch.dtype
        Of the decoder, and so of its cache.
    versions : tuple of (str, str)
        Names and versions of vtc, torch and transformers.
    reused : tuple of str
        Results of an earlier question about the same video that this one used again.
    """

    configs: tuple[CompressionConfig, ...]
    model_type: str
    text_model_type: str
    segments: tuple[SegmentReport, ...]
    lengths_before: tuple[int, ...]
    lengths_per_layer: tuple[tuple[int, ...], ...]
    flops_before: tuple[int, ...] | None
    flops_after: tuple[int, ...] | None
    head_flops: int | None
    kv_bytes_before: tuple[int, ...] | None
    kv_bytes_after: tuple[int, ...] | None
    flops_note: str | None
    spent: tuple[tuple[Site, float], ...]
    dtype: torch.dtype
    versions: tuple[tuple[str, str], ...]
    reused: tuple[str, ...] = ()
    tower_flops_before: int | None = None
    tower_flops_after: int | None = None
    stored_per_layer: tuple[tuple[int, ...], ...] | None = None
    entries: tuple[torch.Tensor, ...] | None = field(default=None, repr=False)
    scope: str | None = None
    probed_layers: int = 0

    @classmethod
    def build(
        cls,
        *,
        configs: Sequence[CompressionConfig],
        model_type: str,
        text_config: PreTrainedConfig,
        segments: Sequence[SegmentReport],
        lengths_before: Sequence[int],
        lengths_per_layer: Sequence[Sequence[int]],
        spent: Mapping[Site, float],
        dtype: torch.dtype,
        transformers_version: str,
        stored_per_layer: Sequence[Sequence[int]] | None = None,
        tower_flops: tuple[int, int] | None = None,
        entries: Sequence[torch.Tensor] | None = None,
        scope: str | None = None,
        probed_layers: int = 0,
    ) -> Report:
        """Compute the report of one prefill.

        Parameters
        ----------
        configs : sequence of CompressionConfig
            The stages, in order.
        model_type : str
            `config.model_type` of the whole model.
        text_config : transformers.PreTrainedConfig
            Configuration of its decoder.
        segments : sequence of SegmentReport
        lengths_before : sequence of int
            (B,) real tokens per row before compression.
        lengths_per_layer : sequence of sequence of int
            (L, B) real tokens per row in every decoder layer.
        spent : mapping of Site to float
            Milliseconds that methods took.
        dtype : torch.dtype
            Of the decoder.
        transformers_version : str
        stored_per_layer : sequence of sequence of int, optional
            (L, B) tokens per row whose keys and values stay in the cache, if fewer than the layer saw.
        tower_flops : (int, int), optional
            FLOPs of the tower's layers on all patches, and on those that were left.
        entries : sequence of Tensor, optional
        scope : str, optional
        probed_layers : int
            As in the report.

        Raises
        ------
        ValueError
            `lengths_per_layer` is not one length per decoder layer and row (an engine's mistake, not a user's).
        """
        depth, rows = text_config.num_hidden_layers, len(lengths_before)
        if len(lengths_per_layer) != depth or any(len(lengths) != rows for lengths in lengths_per_layer):
            raise ValueError(
                f"lengths_per_layer must hold {depth} layers of {rows} rows, got "
                f"{[len(lengths) for lengths in lengths_per_layer]}"
            )
        shape: DecoderShape | None
        try:
            shape, note = DecoderShape.from_config(text_config), None
        except UnsupportedModelError as error:
            # The counts of tokens are valid without a formula; `flops_note` says why the rest is missing.
            shape, note = None, str(error)

        uncompressed = [lengths_before] * depth
        probed = [lengths_before if layer < probed_layers else () for layer in range(depth)]
        return cls(
            configs=tuple(configs),
            model_type=model_type,
            text_model_type=text_config.model_type,
            segments=tuple(segments),
            lengths_before=tuple(lengths_before),
            lengths_per_layer=tuple(tuple(lengths) for lengths in lengths_per_layer),
            flops_before=_layer_flops(shape, uncompressed),
            flops_after=_layer_flops(
                shape, [[*own, *extra] for own, extra in zip(lengths_per_layer, probed, strict=True)]
            ),
            head_flops=None if shape is None else rows * shape.head_flops(),
            kv_bytes_before=_layer_kv_bytes(shape, uncompressed, dtype),
            kv_bytes_after=_layer_kv_bytes(shape, stored_per_layer or lengths_per_layer, dtype),
            flops_note=note,
            spent=tuple(spent.items()),
            tower_flops_before=None if tower_flops is None else tower_flops[0],
            tower_flops_after=None if tower_flops is None else tower_flops[1],
            stored_per_layer=None if stored_per_layer is None else tuple(map(tuple, stored_per_layer)),
            entries=None if entries is None else tuple(entries),
            scope=scope,
            probed_layers=probed_layers,
            dtype=dtype,
            versions=(("vtc", __version__), ("torch", torch.__version__), ("transformers", transformers_version)),
        )

    @property
    def selector_ms(self) -> float:
        """Wall-clock milliseconds that methods took, all sites together."""
        return sum(milliseconds for _, milliseconds in self.spent)

    @property
    def sites(self) -> tuple[tuple[Site, int, int], ...]:
        """Sites where tokens could leave, with the tokens of all segments that came there and that went on.

        Structural tokens, which no method scores, are left out.
        """
        counts: dict[Site, list[int]] = {}
        for segment in self.segments:
            for site, selection in segment.selections:
                count = counts.setdefault(site, [0, 0])
                count[0] += selection.n
                count[1] += selection.k
        return tuple(
            (site, came, left) for site, (came, left) in sorted(counts.items(), key=lambda each: each[0].order)
        )

    @property
    def visual_tokens_before(self) -> int:
        """Visual tokens of all segments before compression."""
        return sum(segment.tokens_before for segment in self.segments)

    @property
    def visual_tokens_after(self) -> int:
        """Visual tokens of all segments after the last stage."""
        return sum(segment.tokens_after for segment in self.segments)

    @cached_property
    def visual_tokens_per_layer(self) -> tuple[int, ...]:
        """(L,) visual tokens of all rows in every decoder layer."""
        text = sum(self.lengths_before) - self.visual_tokens_before  # only visual tokens are ever dropped
        return tuple(sum(lengths) - text for lengths in self.lengths_per_layer)

    @property
    def average_visual_tokens(self) -> float:
        """Mean over the decoder layers of the visual tokens in them: the papers' measure for in-model pruning."""
        return sum(self.visual_tokens_per_layer) / len(self.visual_tokens_per_layer)

    @property
    def prefill_flops_before(self) -> int | None:
        """Prefill FLOPs of the whole decoder without compression; None where the formula is not known."""
        return _total(self.flops_before, self.head_flops)

    @property
    def prefill_flops_after(self) -> int | None:
        """Prefill FLOPs of the whole decoder as run; None where the formula is not known."""
        return _total(self.flops_after, self.head_flops)

    @property
    def total_kv_bytes_before(self) -> int | None:
        """Cache bytes of all layers without compression; None where the formula is not known."""
        return _total(self.kv_bytes_before)

    @property
    def total_kv_bytes_after(self) -> int | None:
        """Cache bytes of all layers as run; None where the formula is not known."""
        return _total(self.kv_bytes_after)

    def _cache_rows(self) -> list[tuple[str, str, str, str]]:
        """Make table rows of what the caches store, layer by layer where they differ in few places."""
        if self.stored_per_layer is None or self.scope is None:
            return []
        before, counts = sum(self.lengths_before), [sum(lengths) for lengths in self.stored_per_layer]
        groups = _layer_groups(counts)
        if len(groups) > 6:
            least, most = min(counts), max(counts)
            groups = [(f"least, layer {counts.index(least)}", least), (f"most, layer {counts.index(most)}", most)]
        mean = sum(counts) / len(counts)
        named = [_counted(f"cache entries, {where}", before, count) for where, count in groups]
        row = "cache entries, mean over layers", f"{before}", f"{mean:.1f}", _percent(mean, before)
        return [row, *(named if len(groups) > 1 else [])]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types, derived figures included."""
        return {
            "configs": [config.to_dict() for config in self.configs],
            "model_type": self.model_type,
            "text_model_type": self.text_model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": dict(self.versions),
            "segments": [segment.to_dict() for segment in self.segments],
            "lengths_before": list(self.lengths_before),
            "lengths_per_layer": [list(lengths) for lengths in self.lengths_per_layer],
            "visual_tokens_before": self.visual_tokens_before,
            "visual_tokens_after": self.visual_tokens_after,
            "visual_tokens_per_layer": list(self.visual_tokens_per_layer),
            "average_visual_tokens": self.average_visual_tokens,
            "flops_before": _listed(self.flops_before),
            "flops_after": _listed(self.flops_after),
            "head_flops": self.head_flops,
            "prefill_flops_before": self.prefill_flops_before,
            "prefill_flops_after": self.prefill_flops_after,
            "kv_bytes_before": _listed(self.kv_bytes_before),
            "kv_bytes_after": _listed(self.kv_bytes_after),
            "total_kv_bytes_before": self.total_kv_bytes_before,
            "total_kv_bytes_after": self.total_kv_bytes_after,
            "flops_note": self.flops_note,
            "tower_flops_before": self.tower_flops_before,
            "tower_flops_after": self.tower_flops_after,
            "stored_per_layer": None if self.stored_per_layer is None else [list(n) for n in self.stored_per_layer],
            "scope": self.scope,
            "probed_layers": self.probed_layers,
            "selector_ms": self.selector_ms,
            "sites": [
                {"site": str(site), "came": came, "left": left, "selector_ms": dict(self.spent).get(site, 0.0)}
                for site, came, left in self.sites
            ],
            "reused": list(self.reused),
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions)
        rows: list[tuple[str, str, str, str]] = [("", "before", "after", "kept")]
        for segment in self.segments:
            label = f"row {segment.row} {segment.modality} {segment.index}, tokens"
            rows.append(_counted(label, segment.tokens_before, segment.tokens_after))
        shrinks_inside = len(set(self.visual_tokens_per_layer)) > 1
        where = " in the last layer" if shrinks_inside else ""
        for row, before in enumerate(self.lengths_before):
            rows.append(_counted(f"row {row}, prompt{where}", before, self.lengths_per_layer[-1][row]))
        if shrinks_inside:
            rows += [
                _counted(f"visual tokens, {where}", self.visual_tokens_before, count)
                for where, count in _layer_groups(self.visual_tokens_per_layer)
            ]
        rows += self._cache_rows()
        before_, average = self.visual_tokens_before, self.average_visual_tokens
        rows.append(("visual tokens, mean over layers", f"{before_}", f"{average:.1f}", _percent(average, before_)))
        flops = self.prefill_flops_before, self.prefill_flops_after
        kv = self.total_kv_bytes_before, self.total_kv_bytes_after
        if flops[0] is not None and flops[1] is not None and kv[0] is not None and kv[1] is not None:
            rows.append(_scaled("prefill FLOPs", flops[0], flops[1], 1000, _FLOPS))
            rows.append(_scaled("KV cache", kv[0], kv[1], 1024, ("B", "KiB", "MiB", "GiB", "TiB")))
        if self.tower_flops_before is not None and self.tower_flops_after is not None:
            figures = self.tower_flops_before, self.tower_flops_after
            rows.insert(1, _scaled("tower FLOPs", *figures, 1000, _FLOPS))
        if len(self.sites) > 1:
            rows[1:1] = [_counted(f"at {site}, tokens", came, left) for site, came, left in self.sites]
            rows += [(f"selector at {site}", "", f"{spent:.2f} ms", "") for site, spent in self.spent]
        else:
            rows.append(("selector", "", f"{self.selector_ms:.2f} ms", ""))
        notes = [] if self.flops_note is None else [f"No FLOPs and KV bytes: {self.flops_note}"]
        if self.probed_layers:
            notes.append(f"{self.probed_layers} decoder layers read the whole prompt first, to choose by")
        if self.scope is not None:
            notes.append(f"Entries of {self.scope} tokens may leave the caches, other ones in each layer")
        if self.reused:
            notes.append(f"Made by an earlier question and re-used: {', '.join(self.reused)}")
        stages = " then ".join(_described(config) for config in self.configs)
        head = f"{stages} on {self.model_type}"
        conditions = f"{self.text_model_type} decoder in {dtype}, {versions}"
        return "\n".join([head, *_aligned(rows), *notes, conditions])


def _layer_flops(shape: DecoderShape | None, lengths: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    if shape is None:
        return None
    return tuple(sum(shape.layer_flops(i, n) for n in rows) for i, rows in enumerate(lengths))


def _layer_kv_bytes(
    shape: DecoderShape | None, lengths: Sequence[Sequence[int]], dtype: torch.dtype
) -> tuple[int, ...] | None:
    if shape is None:
        return None
    size = dtype.itemsize
    return tuple(
        sum(layer.cached_values(n) * size for n in rows) for layer, rows in zip(shape.layers, lengths, strict=True)
    )


def _total(per_layer: tuple[int, ...] | None, extra: int | None = 0) -> int | None:
    return None if per_layer is None or extra is None else sum(per_layer) + extra


def _listed(values: tuple[int, ...] | None) -> list[int] | None:
    return None if values is None else list(values)


def _described(config: CompressionConfig) -> str:
    keep = f"keep_ratio={config.keep_ratio:g}" if config.keep_ratio is not None else f"keep_tokens={config.keep_tokens}"
    at = [] if config.at is None else [f"at={config.at}"]
    options = [f"{name}={value}" for name, value in config.options.items()]
    return f"{config.method}({', '.join([keep, *at, *options])})"


def _layer_groups(values: Sequence[int]) -> list[tuple[str, int]]:
    """Group runs of equal values as ("layers 2-31", value)."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    ends = [*starts[1:], len(values)]
    return [
        (f"layer {a}" if b - a == 1 else f"layers {a}-{b - 1}", values[a]) for a, b in zip(starts, ends, strict=True)
    ]


def _percent(after: float, before: float) -> str:
    return f"{100 * after / before:.1f} %" if before else "-"


def _counted(label: str, before: int, after: int) -> tuple[str, str, str, str]:
    return label, f"{before}", f"{after}", _percent(after, before)


def _scaled(label: str, before: int, after: int, base: int, units: Sequence[str]) -> tuple[str, str, str, str]:
    """Make a table row, both figures in the largest unit in which the first is at least one."""
    power = 0
    while power + 1 < len(units) and before >= base ** (power + 1):
        power += 1
    unit = base**power
    return (
        f"{label}, {units[power]}".removesuffix(", "),
        f"{before / unit:.2f}",
        f"{after / unit:.2f}",
        _percent(after, before),
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Format rows as text: first column aligned to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
