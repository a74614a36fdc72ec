"""`Selection`: what a selector answers. Which tokens stay, and where the others go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from ..errors import InputError
from ..kernels.dispatch import queues
from .grids import Grid

__all__ = ["Selection"]

_Check = tuple[Tensor, str, Tensor | None]
"""Whether a rule holds, the rule, and the values that are quoted if it does not."""


@dataclass(frozen=True, eq=False)
class Selection:
    """K of N tokens that stay, and optionally the slots that the others flow into.

    Attributes
    ----------
    n
        N, tokens before.
    keep
        (K,) long, ascending and unique: original index of the token that stands in each slot. Empty and full are legal.
    assign
        (N,) long or None: slot in 0..K-1 that each token flows into, -1 for dropped; or (N, A): up to A slots per
        token, -1 in the places that are left. A kept token flows into its own slot. None: nothing is merged.
    weight
        As `assign`, float32, or None: coefficients, ``merged[j] = sum of weight[i] * x[i]`` over the tokens that flow
        into slot j. Used as they are, not normalised, so that "target plus mean of the rest" can be said as well as a
        mean. None: plain mean.
    features
        (K, D) float or None: new tokens that stand in the slots instead of what stood there, from a trained module.
        Nothing is merged then. `tokens` gives them; `merge`, of any other values, those of the places.
    text
        (T, D) float or None: new embeddings of the text of the prompt, in its order, from the same module.

    Together `assign` and `weight` are a sparse K x N matrix, and `then` multiplies two of them.

    Raises
    ------
    InputError
        Any of this does not hold.
    """

    n: int
    keep: Tensor
    assign: Tensor | None = None
    weight: Tensor | None = None
    features: Tensor | None = None
    text: Tensor | None = None

    def __post_init__(self) -> None:
        keep, n = self.keep, self.n
        if keep.ndim != 1 or keep.dtype != torch.long:
            raise InputError(f"Selection.keep must be (K,) long, got {tuple(keep.shape)} {keep.dtype}.")
        checks: list[_Check] = []
        if keep.numel():
            rule = f"keep must be ascending, unique and within 0..{n - 1}"
            checks.append((_ascending_within(keep, n), rule, keep))
        if self.assign is not None:
            checks += self._checks_of_assign(self.assign)
        if self.weight is not None:
            checks.append(self._check_of_weight(self.weight))
            object.__setattr__(self, "weight", self.weight.float())
        if self.features is not None:
            checks.append(self._check_of_features(self.features))
        if self.text is not None:
            checks.append(self._check_of_text(self.text))
        if not queues(keep):
            held = [bool(held) for held, _, _ in checks]
        else:  # one transfer: a GPU is waited for once
            held = torch.stack([held.to(keep.device) for held, _, _ in checks]).tolist() if checks else []
        for good, (_, rule, found) in zip(held, checks, strict=True):
            if not good:
                raise InputError(f"Selection.{rule}{'.' if found is None else f', got {_preview(found)}.'}")

    def _checks_of_assign(self, assign: Tensor) -> list[_Check]:
        if assign.ndim not in (1, 2) or len(assign) != self.n or 0 in assign.shape[1:] or assign.dtype != torch.long:
            raise InputError(
                f"Selection.assign must be ({self.n},) or ({self.n}, A) long, got {tuple(assign.shape)} {assign.dtype}."
            )
        slots = ((assign >= -1) & (assign < self.k)).all()
        checks: list[_Check] = [(slots, f"assign must hold slots 0..{self.k - 1} or -1", assign)]
        table = _table(assign)
        if self.n:
            at = self.keep.clamp(0, self.n - 1)  # what is beyond is told by the check of `keep`
            own = (table[at] == self._slots()[:, None]).any(dim=1).all()
            checks.append((own, "assign must send every kept token to its own slot: assign[keep] == 0..K-1", None))
        if table.shape[1] > 1:
            ordered = table.sort(dim=1).values
            once = ~((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()
            checks.append((once, "assign must send no token to one slot twice; add up the weights instead", None))
        return checks

    def _check_of_weight(self, weight: Tensor) -> _Check:
        if self.assign is None:
            raise InputError("Selection.weight says how tokens are merged, so it needs assign, which is None.")
        if weight.shape != self.assign.shape or not weight.is_floating_point():
            expected = tuple(self.assign.shape)
            raise InputError(f"Selection.weight must be {expected} float, got {tuple(weight.shape)} {weight.dtype}.")
        return torch.isfinite(weight).all(), "weight has NaN or infinite entries", None

    def _check_of_features(self, features: Tensor) -> _Check:
        if self.assign is not None:
            raise InputError("Selection.features stand in the slots as they are, so nothing can be merged: no assign.")
        if features.ndim != 2 or len(features) != self.k or not features.is_floating_point():
            raise InputError(
                f"Selection.features must be ({self.k}, D) float, got {tuple(features.shape)} {features.dtype}."
            )
        return torch.isfinite(features).all(), "features has NaN or infinite entries", None

    def _check_of_text(self, text: Tensor) -> _Check:
        if self.features is None or text.ndim != 2 or text.shape[1] != self.features.shape[1]:
            raise InputError(
                f"Selection.text must be (T, D) beside new features of the same D, got {tuple(text.shape)}."
            )
        return torch.isfinite(text).all(), "text has NaN or infinite entries", None

    @classmethod
    def best(cls, scores: Tensor, k: int) -> Selection:
        """Select the `k` highest `scores` (N,), at most N of them; ties go to the lower index.

        Their order needs no check, unlike that of indices from elsewhere.

        Raises
        ------
        InputError
            A score is NaN.
        """
        keep = kernels.topk_indices(scores, k)
        if len(scores) and math.isnan(scores.max().item()):  # NaN is the largest of any
            raise InputError(f"Of {len(scores)} scores, {int(scores.isnan().sum())} are NaN; no best one can be told.")
        best = object.__new__(cls)
        object.__setattr__(best, "n", len(scores))
        object.__setattr__(best, "keep", keep)
        return best

    @classmethod
    def from_indices(cls, n: int, indices: Tensor) -> Selection:
        """Plain selection of distinct `indices` in any order."""
        return cls(n, indices.sort().values)

    @classmethod
    def from_entries(
        cls, n: int, keep: Tensor, token: Tensor, slot: Tensor, weight: Tensor, most: int | None = None
    ) -> Selection:
        """Merge as the entries of a sparse matrix say: `weight` (E,) of each `token` (E,) flows into its `slot` (E,).

        No pair of token and slot comes twice, and no token more than `most` times; None: a GPU is asked how often.
        """
        order = token.sort(stable=True).indices
        token, slot, weight = token[order], slot[order], weight[order].float()
        count = torch.zeros(n, dtype=torch.long, device=token.device).index_add_(0, token, torch.ones_like(token))
        place = torch.arange(len(token), device=token.device) - (count.cumsum(0) - count)[token]
        most = (int(count.max()) if n else 1) if most is None else most
        shape = (n, max(1, most))
        assign = torch.full(shape, -1, device=token.device).index_put_((token, place), slot)
        return cls(n, keep, _narrow(assign), _narrow(weight.new_zeros(shape).index_put_((token, place), weight)))

    @classmethod
    def concatenate(cls, parts: Sequence[Selection]) -> Selection:
        """Join selections of consecutive tokens into one.

        Raises
        ------
        InputError
            Some of them bring new features, and others do not.
        """
        if len(parts) == 1:
            return parts[0]
        new = [part.features for part in parts if part.features is not None]
        if new:
            if len(new) < len(parts):
                raise InputError(f"{len(new)} of {len(parts)} selections bring new features; all have to, or none.")
            offsets = [sum(part.n for part in parts[:index]) for index in range(len(parts))]
            places = torch.cat([part.keep + offset for part, offset in zip(parts, offsets, strict=True)])
            return cls(sum(part.n for part in parts), places, features=torch.cat(new))
        n, k, keep, assign, weight = 0, 0, [], [], []
        width = max(part.matrix()[0].shape[1] for part in parts)
        for part in parts:
            slots, weights = part.matrix()
            pad = (0, width - slots.shape[1])
            keep.append(part.keep + n)
            assign.append(F.pad(torch.where(slots >= 0, slots + k, slots), pad, value=-1))
            weight.append(F.pad(weights, pad))
            n, k = n + part.n, k + part.k
        if all(part.assign is None for part in parts):
            return cls(n, torch.cat(keep))
        return cls(n, torch.cat(keep), _narrow(torch.cat(assign)), _narrow(torch.cat(weight)))

    @classmethod
    def full(cls, n: int, device: torch.device | str | None = None) -> Selection:
        """Keep everything."""
        return cls(n, torch.arange(n, device=device))

    @property
    def k(self) -> int:
        """K, tokens after."""
        return self.keep.numel()

    @property
    def mask(self) -> Tensor:
        """(N,) bool: True where the token stays."""
        mask = torch.zeros(self.n, dtype=torch.bool, device=self.keep.device)
        mask[self.keep] = True
        return mask

    @property
    def ratio(self) -> float:
        """Fraction kept; 1.0 of nothing."""
        return self.k / self.n if self.n else 1.0

    @property
    def sizes(self) -> Tensor:
        """(K,) long: how many tokens each slot stands for."""
        assign = self._assign()
        return torch.bincount(assign[assign >= 0], minlength=self.k)

    @property
    def slots(self) -> Tensor:
        """(N,) long: slot of each token, -1 if it was dropped; of several slots its own, or else the first."""
        assign = self._assign()
        first = (assign >= 0).int().argmax(dim=1, keepdim=True)
        return assign.gather(1, first)[:, 0].index_copy(0, self.keep, self._slots())

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Slots (N, A) and coefficients (N, A) of every token, spelled out also where nothing is merged."""
        return self._assign(), self._weight()

    def merge(self, x: Tensor) -> Tensor:
        """Reduce any per-token tensor (N, ...) to the slots (K, ...).

        Without `assign` this is plain indexing, bit for bit. With it the sums run in float32 (float64 stays) and the
        result has the dtype of `x`. Differentiable.

        Raises
        ------
        InputError
            The first axis is not N, or integers would have to be averaged.
        """
        _check_first_axis(x, self.n, "merge")
        if self.assign is None:
            return x[self.keep.to(x.device)]
        if not x.is_floating_point():
            raise InputError(f"merge averages, which {x.dtype} cannot hold; index with selection.keep instead.")
        assign, weight = (part.to(x.device).unbind(1) for part in self.matrix())
        if len(assign) == 1:
            return kernels.segment_merge(x, assign[0], self.k, weight[0])
        wide = x.double() if x.dtype == torch.float64 else x.float()
        sums = [kernels.segment_merge(wide, a, self.k, w) for a, w in zip(assign, weight, strict=True)]
        return torch.stack(sums).sum(dim=0).to(x.dtype)

    def tokens(self, x: Tensor) -> Tensor:
        """Reduce embeddings (N, D) to those that stand in the slots (K, D), in the dtype of `x`.

        The new `features` if there are some; otherwise as `merge`. Differentiable in both.

        Raises
        ------
        InputError
            As `merge`; or the new features are of another width.
        """
        _check_first_axis(x, self.n, "tokens")
        if self.features is None:
            return self.merge(x)
        if x.shape[1:] != self.features.shape[1:]:
            raise InputError(f"the new features are {self.features.shape[1]} wide, what they replace {x.shape[1]}.")
        return self.features.to(x.device, x.dtype)

    def without_features(self) -> Selection:
        """The same choice without the new features and text, which are large and only the language model reads."""
        return self if self.features is None else dataclasses.replace(self, features=None, text=None)

    def unmerge(self, y: Tensor) -> Tensor:
        """Spread (K, ...) back over the tokens (N, ...): each gets the value at `slots`, dropped ones zero."""
        _check_first_axis(y, self.k, "unmerge")
        assign = self.slots.to(y.device)
        out = y.new_zeros(self.n, *y.shape[1:])
        member = (assign >= 0).nonzero().squeeze(1)
        return out.index_copy(0, member, y[assign[member]])

    def grid_mask(self, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
        """The mask cut into views: one (t, h, w) bool tensor per grid.

        Raises
        ------
        InputError
            The grids do not hold exactly N tokens.
        """
        sizes = [math.prod(grid) for grid in grids]
        if sum(sizes) != self.n:
            raise InputError(
                f"grids {tuple(grids)} hold {sum(sizes)} tokens, but the selection was made from {self.n}."
            )
        return tuple(part.view(*grid) for part, grid in zip(self.mask.split(sizes), grids, strict=True))

    def then(self, other: Selection) -> Selection:
        """Compose with `other`, which selects among the slots of this one; associative.

        Raises
        ------
        InputError
            `other` was not made from K tokens.
        """
        if other.n != self.k:
            raise InputError(f"The second selection was made from {other.n} tokens, but the first leaves {self.k}.")
        keep = self.keep[other.keep]
        if other.features is not None or self.features is not None:
            new = other.features if self.features is None else other.tokens(self.features)
            return Selection(self.n, keep, features=new, text=self.text if other.text is None else other.text)
        if self.assign is None and other.assign is None:
            return Selection(self.n, keep)
        (first, first_weight), (second, second_weight) = self.matrix(), other.matrix()
        if self.k == 0:
            return Selection(self.n, keep, _narrow(first))
        member = (first >= 0)[:, :, None]
        slot = first.clamp(min=0)  # -1 would read the last slot; those entries are replaced below
        assign = torch.where(member, second[slot], -1).flatten(1)
        weight = torch.where(member, first_weight[:, :, None] * second_weight[slot], 0.0).flatten(1)
        return Selection(self.n, keep, *map(_narrow, _sum_repeated(assign, weight.masked_fill(assign < 0, 0.0))))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; `from_dict` restores them exactly (on the CPU)."""
        return {
            "n": self.n,
            "keep": self.keep.tolist(),
            "assign": None if self.assign is None else self.assign.tolist(),
            "weight": None if self.weight is None else self.weight.tolist(),
            "features": None if self.features is None else self.features.tolist(),
            "text": None if self.text is None else self.text.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selection:
        """Inverse of `to_dict`; validates like the constructor."""
        assign, weight = data.get("assign"), data.get("weight")
        features, text = data.get("features"), data.get("text")
        return cls(
            data["n"],
            torch.tensor(data["keep"], dtype=torch.long),
            None if assign is None else torch.tensor(assign, dtype=torch.long),
            None if weight is None else torch.tensor(weight, dtype=torch.float32),
            None if features is None else torch.tensor(features, dtype=torch.float32),
            None if text is None else torch.tensor(text, dtype=torch.float32),
        )

    def _slots(self) -> Tensor:
        return torch.arange(self.k, device=self.keep.device)

    def _assign(self) -> Tensor:
        if self.assign is not None:
            return _table(self.assign)
        return torch.full((self.n,), -1, device=self.keep.device).index_copy(0, self.keep, self._slots())[:, None]

    def _weight(self) -> Tensor:
        """Return the coefficients; those of dropped tokens are never read."""
        if self.weight is not None:
            return _table(self.weight)
        assign = self._assign()
        if self.k == 0:
            return torch.zeros(assign.shape, device=self.keep.device)
        return self.sizes.float().reciprocal()[assign.clamp(min=0)]


def _ascending_within(keep: Tensor, n: int) -> Tensor:
    """() bool: `keep`, which is not empty, ascends within 0..n - 1."""
    ascending = (keep[:-1] < keep[1:]).all()
    if not queues(keep):  # where reading a number is cheaper than computing with it
        return ascending if keep[0].item() >= 0 and keep[-1].item() < n else torch.zeros_like(ascending)
    return ascending & (keep[0] >= 0) & (keep[-1] < n)


def _table(values: Tensor) -> Tensor:
    """(N,) as (N, 1)."""
    return values if values.ndim == 2 else values[:, None]


def _sum_repeated(assign: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tables (N, A') in which no token goes to one slot twice: the weights of equal slots of a token are added."""
    if assign.shape[1] == 1:
        return assign, weight
    first = (assign[:, :, None] == assign[:, None, :]).int().argmax(dim=2)  # of the places with the same slot
    weight = torch.zeros_like(weight).scatter_add(1, first, weight)
    assign = assign.masked_fill(first != torch.arange(assign.shape[1], device=assign.device), -1)
    used = assign >= 0
    order = used.int().argsort(dim=1, descending=True, stable=True)
    order = order[:, : max(1, int(used.sum(dim=1).max()) if len(used) else 1)]
    return assign.gather(1, order), weight.masked_fill(~used, 0.0).gather(1, order)


def _narrow(table: Tensor) -> Tensor:
    """(N, 1) as (N,)."""
    return table[:, 0] if table.shape[1] == 1 else table


def _check_first_axis(x: Tensor, size: int, what: str) -> None:
    if x.ndim < 1 or x.shape[0] != size:
        raise InputError(f"{what} expects {size} entries along the first axis, got shape {tuple(x.shape)}.")


def _preview(x: Tensor) -> str:
    head = ", ".join(map(str, x[:8].tolist()))
    return f"[{head}{', ...' if x.numel() > 8 else ''}]"
