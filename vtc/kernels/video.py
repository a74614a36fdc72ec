"""How much of a video repeats what was there before."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import ConfigError, InputError

from .dispatch import op

__all__ = ["earlier_tokens", "temporal_similarity"]

_BLOCK = 2**18
"""Numbers of `x` that are in work at a time."""

_AGAINST = ("previous", "groups")


@op(triton="vtc.kernels.triton_video:temporal_similarity")
def temporal_similarity(x: Tensor, earlier: Tensor) -> Tensor:
    """Cosine of every token to one earlier token of the video.

    Videos are long: beside `x` and the result, memory is that of one block.

    Parameters
    ----------
    x : Tensor (N, D)
    earlier : LongTensor (N,)
        Index of the token that each one is compared with, -1 for none; see `earlier_tokens`.

    Returns
    -------
    Tensor (N,), float32
        In -1..1; exactly 1 of rows that are equal, zeros included, and else 0 of a zero row; 0 where there is none.

    Raises
    ------
    InputError
        The shapes contradict each other.

    Examples
    --------
    >>> temporal_similarity(x.flatten(0, 1), earlier_tokens(*x.shape[:2]))  # EVS: against the frame before
    >>> temporal_similarity(x.flatten(0, 1), earlier_tokens(*x.shape[:2], "groups"))  # DyCoke: inside groups of four
    >>> temporal_similarity(x.mean(dim=1), earlier_tokens(len(x), 1))  # FastVID: frames, by their mean, in a row
    """
    check(x, earlier)
    similarity = x.new_zeros(len(x), dtype=torch.float32)
    step = max(1, _BLOCK // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        index = earlier[start : start + step]
        own, its = x[start : start + step].float(), x.index_select(0, index.clamp(min=0)).float()
        norms = own.norm(dim=1).clamp_(min=1e-12) * its.norm(dim=1).clamp_(min=1e-12)
        equal = (own == its).all(dim=1)
        cosine = ((own * its).sum(dim=1) / norms).masked_fill_(equal, 1.0)
        similarity[start : start + step] = cosine.clamp_(-1.0, 1.0).masked_fill_(index < 0, 0.0)
    return similarity


def earlier_tokens(frames: int, tokens: int, against: str = "previous") -> Tensor:
    """Which token each one of a video of (frames, tokens) is compared with.

    Parameters
    ----------
    frames, tokens : int
    against : str
        "previous": the one at its place in the frame before (EVS, arXiv 2510.14624; FastVID, arXiv 2503.11187).
        "groups": in every four frames the second against the first, the fourth against the third and the third against
        the first (DyCoke, arXiv 2411.15024).

    Returns
    -------
    LongTensor (frames * tokens,)
        -1 for none.
    """
    frame = torch.arange(frames)
    if against == "previous":
        back = torch.ones_like(frame)
        alone = frame == 0
    elif against == "groups":
        back = torch.tensor([0, 1, 2, 1])[frame % 4]
        alone = frame % 4 == 0
    else:
        raise ConfigError(f"earlier_tokens: against is one of {', '.join(_AGAINST)}; got {against!r}.")
    places = (frame - back)[:, None] * tokens + torch.arange(tokens)
    return places.masked_fill(alone[:, None], -1).flatten()


def check(x: Tensor, earlier: Tensor) -> None:
    """Raise unless the arguments of `temporal_similarity` fit together."""
    if x.ndim != 2 or earlier.shape != x.shape[:1]:
        raise InputError(
            f"temporal_similarity: x {tuple(x.shape)} and earlier {tuple(earlier.shape)} are not (N, D) and (N,)."
        )
