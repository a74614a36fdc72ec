"""Greedy coverage of other things than `coverage_greedy` covers: places of unequal weight, and what a text asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from .cosines import with_inverse_norms
from .dispatch import op
from .graphs import replayed
from .greedy import SimilarityRows, lazy_greedy, stores

_STRIPE = 4096  # rows per block of a pass over all rows


@op()
@replayed(stores)
def weighted_coverage(x: Tensor, k: int, demand: Tensor) -> Tensor:
    """Select `k` rows of `x` by greedy facility location, rows of large `demand` first covered (EADP).

    The coverage of row i is ``demand[i] * (1 + cosine(i, j)) / 2`` of the pick j where that is largest. Every pick is
    the row with the largest gain, the sum of the increases of all coverages; ties go to the lower index. First gains
    are products with one vector; all others are computed lazily, like those of `coverage_greedy` and in its memory.

    Parameters
    ----------
    x
        (N, D): a zero row has cosine 0 to every other.
    k
        Number of picks.
    demand
        (N,), not negative.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order of the picks.
    """
    x, inverse = with_inverse_norms(x)
    return lazy_greedy(_Demanded(x, inverse, demand.float()), k, None, "multiply", torch.zeros_like(inverse))


class _Demanded:
    """Similarities ``demand[i] * (1 + cosine(i, j)) / 2``."""

    def __init__(self, x: Tensor, inverse: Tensor, demand: Tensor) -> None:
        self.half, self.cosines = demand / 2, SimilarityRows(x, inverse)
        self.stored = self.cosines.stored

    def gains(self, covered: Tensor, chosen: Tensor | None = None) -> Tensor:
        if chosen is not None:
            return (self._rows(chosen) - covered).clamp_(min=0).sum(dim=1)
        x, inverse = self.cosines.x, self.cosines.inverse
        if self.cosines.table is not None:
            for _ in self.cosines.blocks():
                pass
            self.cosines.table.add_(1).mul_(self.half)  # from here on it holds the similarities of this class
        total = x.new_zeros(x.shape[1], dtype=torch.float32)
        for rows, scale in zip(x.split(_STRIPE), (self.half * inverse).split(_STRIPE), strict=True):
            total += scale @ rows.float()
        return torch.cat([rows.float() @ total for rows in x.split(_STRIPE)]) * inverse + self.half.sum()

    def row(self, index: Tensor) -> Tensor:
        return self._rows(index)[0]

    def _rows(self, indices: Tensor) -> Tensor:
        rows = self.cosines.rows(indices)
        return rows if self.stored else (1 + rows) * self.half


@op()
@replayed(stores)
def multimodal_coverage(
    x: Tensor, k: int, text: Tensor, metric: Tensor, alpha: float, text_temperature: float, temperature: float
) -> Tensor:
    """Select `k` of N tokens that cover best what a text and all tokens look for (MMTok, arXiv 2508.18264).

    What text token t looks for is the softmax over tokens j of ``cosine(text[t], x[j]) / text_temperature``, divided by
    the number of text tokens; what token i looks for is alpha times the softmax of ``cosine(metric[i], metric[j]) /
    temperature``, divided by N. Each is covered as far as the largest of its entries among the picks, and every pick is
    the token that raises the sum of all coverages most; ties go to the lower index.

    Gains only shrink and are computed lazily, as in `coverage_greedy`. Where that keeps its matrix, the one of the
    tokens is computed once, as half a product; beyond that twice in blocks for its sums, and the rows of candidates on
    demand.

    Parameters
    ----------
    x
        (N, D): a zero row has cosine 0 to every other.
    k
        Number of picks.
    text
        (T, D); T may be 0.
    metric
        (N, d).
    alpha
        Not negative.
    text_temperature, temperature
        At least 0.01, and 0.02.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order of the picks.
    """
    x, inverse = with_inverse_norms(x)
    text, text_inverse = with_inverse_norms(text)
    metric, metric_inverse = with_inverse_norms(metric)
    logits = (text.float() * text_inverse[:, None]) @ x.float().T * inverse
    asked = (logits / text_temperature).softmax(dim=1).T / max(1, len(text))
    rows = _Multimodal(asked, SimilarityRows(metric, metric_inverse), alpha, temperature)
    return lazy_greedy(rows, k, None, "multiply", inverse.new_zeros(asked.shape[1] + len(x)))


class _Multimodal:
    """What the text looks for, `asked` (N, T), beside what the tokens look for.

    The latter are ``E[i, j] / sum over j of E[i, j]`` with the symmetric ``E = exp((cosine - 1) / temperature)``, so
    that half of E gives all of its sums, and a column of quotients is a row of E times a vector.
    """

    def __init__(self, asked: Tensor, cosines: SimilarityRows, alpha: float, temperature: float) -> None:
        self.asked, self.cosines, self.temperature = asked, cosines, temperature
        self.stored = cosines.stored
        if cosines.table is not None:
            for _ in cosines.blocks():
                pass
            self._weight(cosines.table)  # in place: from here on the table is E
        ones = torch.ones_like(cosines.inverse)
        self.share = alpha / (len(ones) * self._product(ones))

    def gains(self, covered: Tensor, chosen: Tensor | None = None) -> Tensor:
        if chosen is None:
            return self.asked.sum(dim=1) + self._product(self.share)
        return (self._rows(chosen) - covered).clamp_(min=0).sum(dim=1)

    def row(self, index: Tensor) -> Tensor:
        return self._rows(index)[0]

    def _rows(self, indices: Tensor) -> Tensor:
        rows = self.cosines.rows(indices)
        weights = rows if self.cosines.table is not None else self._weight(rows)
        return torch.cat([self.asked[indices], weights * self.share], dim=1)

    def _product(self, vector: Tensor) -> Tensor:
        """Return E times a vector (N,)."""
        if self.cosines.table is not None:
            return self.cosines.table @ vector
        total = torch.zeros_like(vector)
        for rows, block in self.cosines.blocks():
            weights = self._weight(block)
            total[rows] += weights @ vector[rows.start :]
            total[rows.stop :] += weights[:, len(block) :].T @ vector[rows]
        return total

    def _weight(self, cosines: Tensor) -> Tensor:
        return cosines.sub_(1).div_(self.temperature).exp_()
