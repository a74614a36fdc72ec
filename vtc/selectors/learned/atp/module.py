"""The modules of ATP-LLaVA: from the scores of the tokens and the question to how many tokens are to stay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ....errors import ConfigError

__all__ = ["LARGEST", "AtpModule", "AtpModules", "following_the_plan", "relative"]

LARGEST = 4.0
"""Largest factor of the planned number of tokens; the smallest is its inverse."""

_STRENGTH = 0.4  # share of a predicted deviation that is followed: a single prediction is rough
_TEXT_SCALE = 0.1  # text has more numbers than scores, and all vary: at their scale it would be learned by heart first


class AtpModule(nn.Module):
    """How many tokens an image keeps at one place, as a factor of what is planned.

    It tells the need of a question about an image, the logarithm of the factor with which the answer stops changing,
    from the scores x and from what the text says, v:

        need = W_2 f(W_1 x + b_1) + b_2 + w . v,   factor = exp(0.4 (need - level)), in 1/4 .. 4

    with the scores x in one of two layouts. "sorted": each score by size, sampled at `grid` evenly spaced ranks, and f
    a GELU: how flat the scores are tells how much there is to look at, wherever it stands. "raster": each score laid on
    the image's grid, 0 where a token was dropped, and resampled to `grid` x `grid`; f is the identity. The latter is
    the paper's linear layer over all tokens. The scores are relative, `relative`, and the share of tokens that are left
    is read beside them. v are the mean values of the text (`TextValues`), brought to mean 0 and standard deviation 0.1.

    Parameters
    ----------
    values
        Numbers in a value vector of the decoder's attention, all key heads together.
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

    def __init__(self, values: int, layout: str = "sorted", grid: int = 24, width: int = 16) -> None:
        super().__init__()
        if layout not in ("sorted", "raster"):
            raise ConfigError(f'atp: layout must be "sorted" or "raster", got {layout!r}.')
        for name, value in (("values", values), ("grid", grid), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"atp: {name} must be an integer of at least 1, got {value!r}.")
        self.values, self.layout, self.grid, self.width = values, layout, grid, width
        self.mix = nn.Linear(2 * (grid if layout == "sorted" else grid**2) + 1, width)
        self.head = nn.Linear(width, 1)
        self.text = nn.Linear(values, 1, bias=False)
        self.level = nn.Parameter(torch.zeros(()))
        """The need that gets what is planned, found in training: the mean factor becomes 1."""
        for weight in (self.head.weight, self.head.bias, self.text.weight):
            nn.init.zeros_(weight)  # what is planned, before training

    def read(self, s_self: Tensor, s_cross: Tensor, origin: Tensor, said: Tensor) -> Tensor:
        """Lay out what is read: (features,), float32, without gradients.

        Parameters
        ----------
        s_self, s_cross
            (N,) attention that the tokens receive from visual tokens and from the text.
        origin
            (N, 6) where they stand.
        said
            (values,) of the text.

        Raises
        ------
        ConfigError
            The model's values have another width than those that the module was made for.
        """
        if said.shape != (self.values,):
            raise ConfigError(f"atp: the modules read {self.values} values of the text, the model has {len(said)}.")
        with torch.no_grad():
            scores = torch.stack([relative(s_self.float()), relative(s_cross.float())])
            left = origin.new_tensor(len(origin)).float() / _count(origin)
            laid = self._sorted(scores) if self.layout == "sorted" else self._square(scores, origin)
            text = _TEXT_SCALE * nn.functional.layer_norm(said.float(), said.shape)
            return torch.cat([laid.flatten(), left[None], text])

    def need(self, read: Tensor) -> Tensor:
        """Tell the need (...) of features (..., F)."""
        scores, text = read.split([self.mix.in_features, self.values], dim=-1)
        hidden = self.mix(scores)
        if self.layout == "sorted":
            hidden = nn.functional.gelu(hidden)
        out: Tensor = (self.head(hidden) + self.text(text)).squeeze(-1)
        return out

    def forward(self, read: Tensor) -> Tensor:
        """Compute factors (...) of features (..., F)."""
        limit = math.log(LARGEST)
        return (_STRENGTH * (self.need(read) - self.level)).clamp(-limit, limit).exp()

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
    values, layout, grid, width
        As in `AtpModule`.

    Raises
    ------
    ConfigError
        An argument is invalid.
    """

    def __init__(
        self, shares: Sequence[float], values: int, layout: str = "sorted", grid: int = 24, width: int = 16
    ) -> None:
        super().__init__()
        if isinstance(shares, (str, float, int)) or not shares or not all(0 < share <= 1 for share in shares):
            raise ConfigError(f"atp: shares must be fractions above 0, one for each place, got {shares!r}.")
        self.shares = tuple(float(share) for share in shares)
        self.places = nn.ModuleList(AtpModule(values, layout, grid, width) for _ in shares)

    def count(
        self,
        place: int,
        s_self: Tensor,
        s_cross: Tensor,
        origin: Tensor,
        said: Tensor,
        factor: float | None = None,
    ) -> int:
        """Say how many of N tokens are to stay, at least one: what the module says, or `factor` times the plan."""
        module: AtpModule = self.places[place]  # type: ignore[assignment]
        read = module.read(s_self, s_cross, origin, said)
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
