"""At the pixels: pictures become smaller before the tower runs, and what it gives is put where the model expects it.

The encoder runs on smaller pictures, so that every layer of the tower, and every stage inside it, sees nothing else.
The prompt still has a placeholder for every token of the larger picture: the tokens of the smaller one stand at those
that the stage chose, zeros stand at the others, and these are never looked at.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from vtc.adapters.base import Adapter, Layout, rows_of
from vtc.core.context import VisualContext
from vtc.core.grids import Grid, grid_coords
from vtc.core.observations import TokenGrids
from vtc.core.selection import Selection
from vtc.core.sites import Site
from vtc.engine.plan import PlannedStage
from vtc.errors import UnsupportedMethodError

if TYPE_CHECKING:
    from vtc.engine.encoder import Encoded

__all__ = ["Resampling", "resample"]


@dataclass(eq=False)
class Resampling:
    """One call of an encoder whose pictures have become smaller.

    Attributes
    ----------
    site
        Where the stage works.
    call
        Arguments of the encoder, with the smaller pictures.
    before, after
        Grids of tokens of every image or video.
    places
        (K,) where the tokens of all smaller pictures stand among the N that the model expects.
    spent
        Milliseconds that the method took.
    """

    site: Site
    call: dict[str, Any]
    before: list[Grid]
    after: list[Grid]
    places: torch.Tensor
    spent: float

    @property
    def n(self) -> int:
        """N, tokens that the model expects."""
        return sum(map(math.prod, self.before))

    def output(self, output: Any) -> Any:
        """Return what the encoder gave at the length that the model expects."""
        spread = copy.copy(output)
        spread.pooler_output = self._parts(output.pooler_output)
        planes = getattr(output, "deepstack_features", None)
        if planes is not None:
            spread.deepstack_features = [self._parts(plane) for plane in planes]
        return spread

    def encoded(self, encoded: Encoded, output: Any) -> Encoded:
        """Return what was read of the smaller pictures at the length that the model expects."""
        lengths = [math.prod(grid) for grid in self.before]
        rows = rows_of(output).detach()
        return replace(
            encoded,
            features=rows,
            layout=Layout(lengths, [(grid,) for grid in self.before], rows.new_zeros(self.n, dtype=torch.bool)),
            signals={signal: self._rows(values) for signal, values in encoded.signals.items()},
            survivors={
                self.site: self._rows(torch.ones_like(self.places, dtype=torch.bool)),
                **{site: self._rows(left) for site, left in encoded.survivors.items()},
            },
            spent={**encoded.spent, self.site: self.spent + encoded.spent.get(self.site, 0.0)},
            resampled=self.after,
        )

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        """Put values (K, ...) at their places among (N, ...), zeros elsewhere."""
        return values.new_zeros(self.n, *values.shape[1:]).index_copy(0, self.places.to(values.device), values)

    def _parts(self, value: Any) -> Any:
        """Do as `_rows`, for a tensor or for a container with a tensor per image or video."""
        if isinstance(value, torch.Tensor):
            return self._rows(value)
        rows = self._rows(torch.cat(list(value)))
        return type(value)(rows.split([math.prod(grid) for grid in self.before]))


def resample(adapter: Adapter, stage: PlannedStage, modality: str, call: Mapping[str, Any]) -> Resampling:
    """Let a stage choose how large every image or video is to be, and make it so.

    Raises
    ------
    UnsupportedMethodError
        The places that the stage chose do not form a grid.
    """
    before = adapter.token_grids(modality, call)
    after, sizes, places, start = [], [], [], 0
    began = time.perf_counter()
    for grid in before:
        keep = _choose(stage, modality, grid).keep.cpu()
        steps, rows, columns = (axis.unique() for axis in grid_coords((grid,))[keep].unbind(dim=1)[1:])
        smaller: Grid = (len(steps), len(rows), len(columns))
        if math.prod(smaller) != len(keep):
            raise UnsupportedMethodError(
                f"{stage.selector.name} resamples pictures, but chose {len(keep)} places of a grid of {grid} that form "
                "no grid themselves"
            )
        after.append(smaller)
        sizes.append((steps, *smaller[1:]))
        places.append(keep + start)
        start += math.prod(grid)
    spent = 1e3 * (time.perf_counter() - began)
    given = dict(call) if after == before else {**call, **adapter.resampled(modality, call, sizes)}
    return Resampling(stage.site, given, before, after, torch.cat(places), spent)


@torch.no_grad()
def _choose(stage: PlannedStage, modality: str, grid: Grid) -> Selection:
    n = math.prod(grid)
    raw = TokenGrids((grid,))
    context = VisualContext(
        features=torch.empty(n, 0),
        budget=stage.budget(n),
        generator=torch.Generator().manual_seed(stage.config.seed),
        grids=(grid,),
        modality=modality if grid[0] > 1 else "image",
        site=stage.site,
        keep_ratio=stage.keep_ratio,
        signals={signal: signal.present(signal.compute(raw)) for signal in stage.stage.requires},
    )
    return stage.selector.select(context.check())
