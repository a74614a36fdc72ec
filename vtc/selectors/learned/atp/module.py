"""The modules of ATP-LLaVA: from the scores of the tokens to how many of them are to stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ....errors import ConfigError

__all__ = ["LARGEST", "AtpModule", "AtpModules", "following_the_plan", "relative"]

LARGEST = 4.0
"""Largest factor of the planned number of tokens; the smallest is its inverse."""


class AtpModule(nn.Module):
    """How many tokens an image keeps at one place, read off its scores, as a factor of what is planned.

        factor = 4^tanh(W_2 f(W_1 x + b_1) + b_2)

    with the scores x in one of two layouts. "sorted": each score by size, sampled at `grid` evenly spaced ranks, and f
    a GELU: how flat the scores are tells how much there is to look at, wherever it stands. "raster": each score laid on
    the image's grid, 0 where a token was dropped, and resampled to `grid` x `grid`; f is the identity. The latter is
    the paper's linear layer over all tokens. The scores are relative, `relative`, and the share of tokens that are left
    is read beside them.

    Parameters
    ----------
    layout
        "sorted" or "raster".
    grid
        Ranks, or edge of the square.
    width
        Of the hidden layer.

    Raises
    ------
    ConfigError
        An argument is invalid.
    """

    def __init__(self, layout: str = "sorted", grid: int = 24, width: int = 16) -> None:
        super().__init__()
        if layout not in ("sorted", "raster"):
            raise ConfigError(f'atp: layout must be "sorted" or "raster", got {layout!r}.')
        for name, value in (("grid", grid), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"atp: {name} must be an integer of at least 1, got {value!r}.")
        self.layout, self.grid, self.width = layout, grid, width
        self.mix = nn.Linear(2 * (grid if layout == "sorted" else grid**2) + 1, width)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)  # what is planned, before training
        nn.init.zeros_(self.head.bias)

    def read(self, s_self: Tensor, s_cross: Tensor, origin: Tensor) -> Tensor:
        """Lay out scores (N,) and (N,) of tokens at `origin` (N, 6): (features,), float32, without gradients."""
        with torch.no_grad():
            scores = torch.stack([relative(s_self.float()), relative(s_cross.float())])
            left = origin.new_tensor(len(origin)).float() / _count(origin)
            laid = self._sorted(scores) if self.layout == "sorted" else self._square(scores, origin)
            return torch.cat([laid.flatten(), left[None]])

    def forward(self, read: Tensor) -> Tensor:
        """Compute factors (...) of features (..., F)."""
        hidden = self.mix(read)
        if self.layout == "sorted":
            hidden = nn.functional.gelu(hidden)
        out: Tensor = LARGEST ** torch.tanh(self.head(hidden)).squeeze(-1)
        return out

    def _sorted(self, scores: Tensor) -> Tensor:
        """Sample scores (2, N), largest first, at `grid` ranks."""
        ordered = scores.sort(dim=1, descending=True).values
        ranks = torch.linspace(0, scores.shape[1] - 1, self.grid, device=scores.device)
        low = ranks.long().clamp(max=scores.shape[1] - 1)
        high = (low + 1).clamp(max=scores.shape[1] - 1)
        return torch.lerp(ordered[:, low], ordered[:, high], ranks - low)

    def _square(self, scores: Tensor, origin: Tensor) -> Tensor:
        """Resample scores (2, N) to (2, grid, grid), averaged over views and frames; 0 where no token is left."""
        squares = []
        for frame in origin[:, :2].unique(dim=0):
            here = (origin[:, :2] == frame).all(dim=1)
            _, _, row, column, rows, columns = origin[here].unbind(1)
            plane = scores.new_zeros(2, int(rows[0]), int(columns[0]))
            plane[:, row, column] = scores[:, here]
            squares.append(nn.functional.adaptive_avg_pool2d(plane, self.grid))
        return torch.stack(squares).mean(dim=0)


class AtpModules(nn.Module):
    """One `AtpModule` per place, and the plan that their factors refer to.

    Parameters
    ----------
    shares
        Of the tokens at the input, planned behind each place.
    layout, grid, width
        As in `AtpModule`.

    Raises
    ------
    ConfigError
        An argument is invalid.
    """

    def __init__(self, shares: Sequence[float], layout: str = "sorted", grid: int = 24, width: int = 16) -> None:
        super().__init__()
        if isinstance(shares, (str, float, int)) or not shares or not all(0 < share <= 1 for share in shares):
            raise ConfigError(f"atp: shares must be fractions above 0, one for each place, got {shares!r}.")
        self.shares = tuple(float(share) for share in shares)
        self.places = nn.ModuleList(AtpModule(layout, grid, width) for _ in shares)
        self.price = nn.Parameter(torch.full((len(self.shares),), -2.0))
        """Logarithm of what the planned number costs at each place, found in training: the mean factor becomes 1."""

    def count(self, place: int, s_self: Tensor, s_cross: Tensor, origin: Tensor, factor: float | None = None) -> int:
        """Say how many of N tokens are to stay, at least one: what the module says, or `factor` times the plan."""
        module: AtpModule = self.places[place]  # type: ignore[assignment]
        read = module.read(s_self, s_cross, origin)
        plan = _PLAN.get()
        if plan is not None:
            factor = plan[0]
            plan[1].append((place, read.cpu()))
        factor = float(module(read).detach()) if factor is None else factor
        return min(len(origin), max(1, round(factor * self.shares[place] * _count(origin))))


_PLAN: ContextVar[tuple[float, list[tuple[int, Tensor]]] | None] = ContextVar("vtc_atp_plan", default=None)


@contextmanager
def following_the_plan(factor: float = 1.0) -> Iterator[list[tuple[int, Tensor]]]:
    """Keep `factor` times what is planned of every image while entered; yields places and what modules read there."""
    noted: list[tuple[int, Tensor]] = []
    token = _PLAN.set((factor, noted))
    try:
        yield noted
    finally:
        _PLAN.reset(token)


def relative(score: Tensor) -> Tensor:
    """Give scores (..., N) as ``s / (s + mean)``: 1/2 where a token has the mean."""
    mean = score.sum(dim=-1, keepdim=True) / score.shape[-1]
    return score / (score + mean).clamp(min=torch.finfo(score.dtype).tiny)


def _count(origin: Tensor) -> int:
    """Count the tokens that the views had whose tokens are at `origin`, before any were dropped."""
    frames = origin[:, [0, 1, 4, 5]].unique(dim=0)
    return int((frames[:, 2] * frames[:, 3]).sum())
