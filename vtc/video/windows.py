"""A video of any length in bounded memory: windows of frames are encoded, and only the tokens that stay are kept.

`read_video` drives an installed engine. Per window it makes pixels, runs the tower, lets the method choose and keeps
the chosen features alone; then the language model reads these, at the positions that they have in the full prompt, into
a cache that any number of questions can continue.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from vtc.budget import check_budget, largest_remainder
from vtc.config import CompressionConfig
from vtc.core.grids import Grid
from vtc.core.selection import Selection
from vtc.core.signals import Signal
from vtc.core.sites import BeforeDecoder, Site
from vtc.engine.append import append
from vtc.engine.choose import choose
from vtc.engine.encoder import Encoded
from vtc.engine.engine import Engine
from vtc.engine.prompt import Segment
from vtc.errors import ConfigError, InputError, UnsupportedMethodError
from vtc.plain import shown
from vtc.report.report import Report, SegmentReport
from vtc.video.prompt import VideoPrompt

__all__ = ["ReadVideo", "VideoBudget", "read_video", "streams"]


@dataclass(frozen=True)
class VideoBudget:
    """Budget of a video; exactly one of the four is given.

    Attributes
    ----------
    keep_ratio
        Fraction of every window, in (0, 1].
    keep_tokens
        Of the whole video, shared among the windows in proportion to their frames.
    per_window
        Of every window.
    per_frame
        Of every step in time, each chosen by itself. A step is a frame, or two frames where a family joins them.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    per_window: int | None = None
    per_frame: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError(
                "Give exactly one of keep_ratio, keep_tokens, per_window and per_frame; got "
                f"{', '.join(f'{name}={shown(value)}' for name, value in given.items()) or 'none'}."
            )
        name, value = next(iter(given.items()))
        try:
            found = check_budget(value if name == "keep_ratio" else None, None if name == "keep_ratio" else value)
        except ConfigError as error:
            raise ConfigError(str(error).replace("keep_tokens", name)) from error
        object.__setattr__(self, name, next(number for number in found if number is not None))

    @property
    def whole(self) -> bool:
        """Whether a method that sees the whole video at once can be given it."""
        return self.per_window is None and self.per_frame is None

    def shares(self, frames: Sequence[int]) -> list[int | None]:
        """Return the tokens of each window, given its frames; None where the configuration's own ratio holds."""
        if self.keep_tokens is not None:
            return [*largest_remainder(self.keep_tokens, frames)]
        return [self.per_window] * len(frames)

    def config(self, method: str, **arguments: Any) -> CompressionConfig:
        """Return the configuration of the engine; counts of windows replace its budget as they come."""
        return CompressionConfig(
            method, self.keep_ratio, self.keep_tokens or self.per_window or self.per_frame, **arguments
        )


@dataclass(eq=False)
class _Piece:
    """The kept tokens of one window: `rows` tokens are in the prompt, `kept` (K,) of them stay with these features."""

    rows: int
    kept: torch.Tensor
    features: torch.Tensor
    planes: list[torch.Tensor]
    grid: Grid
    selection: Selection
    structural: torch.Tensor


class _Arena:
    """A few blocks of memory that pieces are copied into, side by side.

    A piece is small and stays, the tensors of the window around it are large and are freed. Left where it was
    allocated, it would keep the C library from returning that memory or using it for the next window: of an hour of
    video, 3 MiB of pieces held 300 MiB.
    """

    _BLOCK = 1 << 22

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def put(self, piece: _Piece) -> _Piece:
        """Copy a piece; tensors on a GPU have an allocator that does this by itself."""
        selection = piece.selection
        merged = (None if part is None else self._copied(part) for part in (selection.assign, selection.weight))
        return replace(
            piece,
            kept=self._copied(piece.kept),
            features=self._copied(piece.features),
            planes=[self._copied(plane) for plane in piece.planes],
            structural=self._copied(piece.structural),
            selection=Selection(selection.n, self._copied(selection.keep), *merged),
        )

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu":
            return tensor
        start = -(-self._used // 64) * 64
        if start + tensor.nbytes > len(self._block):
            start, self._block = 0, torch.empty(max(self._BLOCK, tensor.nbytes), dtype=torch.uint8)
        self._used = start + tensor.nbytes
        return self._block[start : self._used].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@dataclass(eq=False)
class ReadVideo:
    """A compressed video in a cache.

    Attributes
    ----------
    prompt : VideoPrompt
    cache : Cache
        The language model's, up to and including the video.
    prefix : LongTensor (1, P)
        Full ids of what the cache stands for.
    segment : SegmentReport
    windows : list of (int, int, int)
        Frames, tokens before and tokens after of every window.
    seconds : dict
        What took how long: "decode", "process", "encode", "select", "prefill".
    """

    prompt: VideoPrompt
    cache: Any
    prefix: torch.Tensor
    segment: SegmentReport
    windows: list[tuple[int, int, int]]
    seconds: dict[str, float] = field(default_factory=dict)

    def report(self, engine: Engine, ids: torch.Tensor) -> Report:
        """As `vtc.report`, of this video and one question's prompt (1, P)."""
        before = ids.shape[1]
        after = before - self.segment.tokens_before + self.segment.tokens_after
        lengths = [[after]] * engine.plan.shape.decoder_layers
        return engine.build_report([self.segment], [before], lengths, {BeforeDecoder(): 1e3 * self.seconds["select"]})


def streams(engine: Engine) -> bool:
    """Tell whether the methods need neither the text nor the decoder, so that a video can be read in windows."""
    plan = engine.plan
    return not (plan.in_decoder or plan.updates or plan.after_prefill or plan.reads_text or plan.probes)


@torch.no_grad()
def read_video(
    engine: Engine,
    prompt: VideoPrompt,
    windows: Iterable[np.ndarray[Any, Any]],
    size: int,
    budget: VideoBudget,
    progress: Any = None,
) -> ReadVideo:
    """Read a video into a cache.

    Parameters
    ----------
    engine : Engine
        Installed, enabled, with a method that neither looks at the text nor works inside the decoder.
    prompt : VideoPrompt
        For this video's sampled frames.
    windows : iterable of arrays (T, H, W, 3)
        The sampled frames, `size` at a time; pulled one by one.
    size : int
        Frames per window, a multiple of `prompt.join`.
    budget : VideoBudget
    progress : callable, optional
        Called with the number of frames after every window.
    """
    if not streams(engine):
        methods = " then ".join(config.method for config in engine.plan.configs)
        why = "looks at the question" if engine.plan.reads_text else "removes tokens inside the decoder or its caches"
        raise UnsupportedMethodError(
            f"{methods} {why}, so it must see the whole video and the question at once: raise window= to the number of "
            "frames, or choose a method that works before the decoder and without the text"
        )
    numbers = [prompt.frames[start : start + size] for start in range(0, len(prompt.frames), size)]
    shares = budget.shares([len(window) for window in numbers])
    seconds = dict.fromkeys(("decode", "process", "encode", "select", "prefill"), 0.0)
    pieces: list[_Piece] = []
    arena = _Arena()
    clock = _Clock(seconds, engine.model.device)
    for number, frames in enumerate(windows):
        clock.lap("decode")
        made = prompt.process(frames, numbers[number], size)
        clock.lap("process")
        output = prompt.encode(made)
        clock.lap("encode")
        last = number == len(numbers) - 1
        pieces.append(arena.put(_select(engine, output, budget, shares[number], last)))
        clock.lap("select")
        if progress is not None:
            progress(len(frames))
    ids = prompt.ids("?")
    read = _read(engine, prompt, pieces, ids, [len(window) for window in numbers])
    clock.lap("prefill")
    read.seconds = seconds
    return read


class _Clock:
    """Add the time between laps to named sums."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds, self.device = seconds, device
        self.began = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] += now - self.began
        self.began = now


def _select(engine: Engine, output: Any, budget: VideoBudget, share: int | None, last: bool) -> _Piece:
    """Let the method choose among the tokens of one window, and keep nothing else."""
    encoded: Encoded = engine.encoded(output)
    structural = encoded.layout.structural
    marks = structural.nonzero()[:, 0].tolist()
    if not last and marks == [len(structural) - 1]:
        structural = structural[:-1]  # a newline that ends a video ends the last window only
    rows = len(structural)
    # Where the layout leaves it to the prompt how many tiles, here frames, belong together.
    units = rows // encoded.layout.unit if encoded.layout.lengths is None else 1
    (t, h, w), *others = encoded.layout.grids[0] * units
    grid: Grid = (t * (1 + len(others)), h, w)
    scorable = (~structural).nonzero()[:, 0]
    features = encoded.features[scorable]
    signals = {signal: value[scorable] for signal, value in encoded.signals.items()}
    survivors = {site: left[scorable] for site, left in encoded.survivors.items()}

    chosen: list[Selection] = []
    parts: list[torch.Tensor] = []
    step = h * w if budget.per_frame is not None else len(scorable)
    for start in range(0, len(scorable), step):
        place = slice(start, start + step)
        selection, merged = _choose(
            engine,
            features[place],
            {signal: value[place] for signal, value in signals.items()},
            {site: left[place] for site, left in survivors.items()},
            encoded.resampled[0] if encoded.resampled is not None and step == len(scorable) else None,
            (step // (h * w), h, w),
            int(structural.sum()),
            share,
        )
        chosen.append(selection)
        parts.append(merged)
    selection = Selection.concatenate(chosen)
    kept = scorable[selection.keep.to(scorable.device)]
    rows_of_kept = torch.cat(parts)
    if len(kept) and engine.plan.structural == "keep" and bool(structural.any()):
        extra = structural.nonzero()[:, 0]
        kept, order = torch.cat([kept, extra]).sort()
        rows_of_kept = torch.cat([rows_of_kept, encoded.features[extra].to(rows_of_kept.dtype)])[order]
    planes = []
    for layer in getattr(output, "deepstack_features", None) or ():  # a tensor, or one per video
        plane = layer if isinstance(layer, torch.Tensor) else torch.cat(list(layer))
        planes.append(plane[kept.to(plane.device)])
    return _Piece(rows, kept, rows_of_kept.to(engine.model.dtype), planes, grid, selection, structural)


def _choose(
    engine: Engine,
    features: torch.Tensor,
    signals: dict[Signal, torch.Tensor],
    survivors: dict[Site, torch.Tensor],
    resampled: Grid | None,
    grid: Grid,
    structural: int,
    share: int | None,
) -> tuple[Selection, torch.Tensor]:
    """Select among (n, D) features by all stages up to the decoder; return the features that stay too."""
    n = len(features)
    if share == 0:
        return Selection(n, torch.zeros(0, dtype=torch.long, device=features.device)), features[:0]
    segment = Segment(
        row=0,
        index=0,
        modality="video",
        columns=torch.arange(n + structural, device=features.device),
        grids=(grid,),
        structural=(torch.arange(n + structural, device=features.device) >= n),
        features=features,
        signals=signals,
        kept=torch.arange(n, device=features.device),
        survivors=survivors,
        resampled=resampled,
    )
    segment.add_grid_signals(engine.plan.signals)
    segment.leave_tower()
    for stage in engine.plan.before_decoder:
        choose(stage.with_tokens(share), segment, structural=engine.plan.structural)
    whole = Selection.full(n, features.device)
    for _, selection in segment.selections:
        whole = whole.then(selection)
    return whole, segment.features


def _read(
    engine: Engine, prompt: VideoPrompt, pieces: Sequence[_Piece], ids: torch.Tensor, frames: Sequence[int]
) -> ReadVideo:
    """Put text and pieces into a new cache, up to the end of the video."""
    where = (ids[0] == prompt.token_id).nonzero()[:, 0]
    rows = sum(piece.rows for piece in pieces)
    if len(where) != rows:
        raise InputError(
            f"The processor's text has {len(where)} placeholders for the video, but its windows made {rows} tokens; "
            "this processor treats parts of a video unlike the whole, so raise window= to the number of frames."
        )
    end = int(where[-1]) + 1
    prefix = ids[:, :end]
    positions = prompt.positions(ids)[..., :end]
    keep = prefix != prompt.token_id
    starts = np.cumsum([0, *(piece.rows for piece in pieces)]).tolist()
    kept = torch.cat([piece.kept.to(where.device) + start for piece, start in zip(pieces, starts, strict=False)])
    keep[0, where[kept]] = True
    here = keep[0].nonzero()[:, 0]
    visual = prefix[0, here] == prompt.token_id
    table = engine.model.get_input_embeddings()
    text = table(prefix[0, here[~visual]])
    embeds = text.new_empty(len(here), text.shape[-1])
    embeds[~visual] = text
    embeds[visual] = torch.cat([piece.features for piece in pieces]).to(embeds)
    planes = [torch.cat(layer).to(embeds) for layer in zip(*(piece.planes for piece in pieces), strict=True)]
    cache = DynamicCache(config=engine.text_config)
    append(engine, cache, embeds[None], keep, positions, visual=visual[None], deepstack=planes)

    selection = Selection.concatenate([piece.selection for piece in pieces])
    structural = torch.cat([piece.structural for piece in pieces])
    t = sum(piece.grid[0] for piece in pieces)
    segment = SegmentReport(
        row=0,
        index=0,
        modality="video",
        tokens_before=rows,
        tokens_after=len(kept),
        structural=int(structural.sum()),
        grids=((t, *pieces[0].grid[1:]),),
        selections=((BeforeDecoder(), selection),),
        kept=kept,
    )
    counts = [(count, piece.rows, len(piece.kept)) for count, piece in zip(frames, pieces, strict=True)]
    return ReadVideo(prompt, cache, prefix, segment, counts)
