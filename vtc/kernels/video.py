"""Temporal redundancy of the tokens of a video."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import ConfigError, InputError

from .dispatch import op

__all__ = ["earlier_tokens", "temporal_similarity"]

_BLOCK = 2**18
"""Elements of `x` per block, which bounds the memory."""

_LEAST = 1e-12  # norm
_NEAR = 1 - 1e-4  # cosines of equal rows differ from 1 by less

_AGAINST = ("previous", "groups")


@op(triton="vtc.kernels.triton_video:temporal_similarity")
def temporal_similarity(x: Tensor, earlier: Tensor) -> Tensor:
    """Compute the cosine of every token to one earlier token of the video.

    Processed in blocks: beside `x` and the result it needs the memory of one block.

    Parameters
    ----------
    x : Tensor (N, D)
    earlier : LongTensor (N,)
        Index of the token that each token is compared with, -1 for none; see `earlier_tokens`.

    Returns
    -------
    Tensor (N,), float32
        In -1..1; exactly 1 for equal rows, zero rows included; otherwise 0 for a zero row; 0 without an earlier token.

    Raises
    ------
    InputError
        The shapes do not fit together.

    Examples
    --------
    >>> temporal_similarity(x.flatten(0, 1), earlier_tokens(*x.shape[:2]))  # EVS: previous frame
    >>> temporal_similarity(x.flatten(0, 1), earlier_tokens(*x.shape[:2], "groups"))  # DyCoke: in groups of four
    >>> temporal_similarity(x.mean(dim=1), earlier_tokens(len(x), 1))  # FastVID: means of frames
    """
    check(x, earlier)
    x = x.float() if x.dtype == torch.float64 else x
    step = max(1, _BLOCK // max(1, x.shape[1]))
    # In blocks, because the norm of a half-precision tensor makes a float32 copy of it.
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in x.split(step)]
    norm = torch.cat(norms).clamp_(min=_LEAST) if norms else x.new_zeros(0, dtype=torch.float32)
    similarity = torch.zeros_like(norm)
    for start in range(0, len(x), step):
        index = earlier[start : start + step]
        place = index.clamp(min=0)
        own, lengths = x[start : start + step], norm[start : start + step]
        products = x.index_select(0, place).float().mul_(own)
        cosine = products.sum(dim=1).div_(lengths * norm.index_select(0, place))
        # Only these can be equal, and of most videos few tokens are.
        near = ((cosine > _NEAR) | (lengths == _LEAST)).nonzero()[:, 0]
        if len(near):
            equal = near[(own[near] == x[place[near]]).all(dim=1)]
            cosine[equal] = 1.0
        similarity[start : start + step] = cosine.clamp_(-1.0, 1.0).masked_fill_(index < 0, 0.0)
    return similarity


def earlier_tokens(frames: int, tokens: int, against: str = "previous") -> Tensor:
    """Return the index of the earlier token that every token of a video (frames, tokens) is compared with.

    Parameters
    ----------
    frames, tokens : int
    against : str
        "previous": the token at the same place in the previous frame (EVS, arXiv 2510.14624; FastVID, arXiv
        2503.11187). "groups": in groups of four frames the second with the first, the fourth with the third and the
        third with the first (DyCoke, arXiv 2411.15024).

    Returns
    -------
    LongTensor (frames * tokens,)
        -1 for none.

    Raises
    ------
    ConfigError
        `against` is neither of these.
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
    """Raise an error unless the arguments of `temporal_similarity` fit together."""
    if x.ndim != 2 or earlier.shape != x.shape[:1]:
        raise InputError(
            f"temporal_similarity: x {tuple(x.shape)} and earlier {tuple(earlier.shape)} are not (N, D) and (N,)."
        )
