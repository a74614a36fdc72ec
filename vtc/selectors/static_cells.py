"""What PruneVid and HoliTom share: places that stay alike through a window of frames become one token.

Nothing here asks a GPU for a number: what is as many as the video makes it is as long as it can be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core.selection import Selection
from ..kernels.cluster import counts_of
from ..kernels.dispatch import queues
from ..kernels.host import upload
from .frames import Frames, group_sums, place_of

__all__ = ["NEIGHBOURS", "Places", "Units", "clustered_means", "places_of", "static_units"]

NEIGHBOURS = 7  # of a token, in the density of its group


@dataclass(frozen=True, eq=False)
class Places:
    """Where the N tokens of T frames stand among P places, which are the same in all frames.

    Attributes
    ----------
    token
        (T, P) long: the token at every place of every frame, -1 where there is none.
    at
        (N,) long: where every token stands in that table, frame * P + place.
    frame
        (N,) long.
    """

    token: Tensor
    at: Tensor
    frame: Tensor

    def table(self, values: Tensor, absent: float) -> Tensor:
        """(T, P): the values (N,) of the tokens, and `absent` where there is none."""
        table = values.new_full((self.token.numel(),), absent)
        return table.index_copy_(0, self.at, values).view_as(self.token)

    def of_tokens(self, table: Tensor) -> Tensor:
        """(N,): what stands at the places of the tokens in a table (T, P)."""
        return table.flatten().index_select(0, self.at)


def places_of(frames: Frames) -> Places:
    """Number the places of a video; they are known to the host."""
    place = place_of(frames.origin).unique(return_inverse=True)[1]
    shape = len(frames.sizes), int(place.max()) + 1
    at = frames.on_host * shape[1] + place
    token = torch.full(shape, -1)
    token.view(-1).index_copy_(0, at, torch.arange(len(at)))
    device = frames.number.device
    return Places(upload(token, device), upload(at, device), frames.number)


@dataclass(frozen=True, eq=False)
class Units:
    """What is left of a video once the static places of a window are one token each.

    Attributes
    ----------
    places
        Of the video.
    stands
        (N,) long: the token that stands for the unit of every token; for that of a static place the one in the first
        frame of its window.
    group
        (N,) long: of the tokens that stand for themselves the frame, of those that stand for a static place T + window;
        -1 of the others.
    """

    places: Places
    stands: Tensor
    group: Tensor

    @property
    def frames(self) -> int:
        """T."""
        return len(self.places.token)

    @property
    def sizes(self) -> Tensor:
        """(2T,) long: units of every group."""
        return counts_of(self.group, 2 * self.frames)

    @property
    def moving(self) -> Tensor:
        """(N,) long: the frame of every token that stands for itself, -1 of the others."""
        return self.group.masked_fill(self.group >= self.frames, -1)

    def selection(self, x: Tensor, centre: Tensor, shares: Tensor, budget: int) -> Selection:
        """Merge the tokens `x` (N, D) into `budget`, each the mean of all tokens that flow into it.

        `centre` (N,) is the token that every token which stands for itself flows into, -1 if it is dropped. The static
        places of every window are clustered by density, into ``shares[T:]``.
        """
        frames, width = self.places.token.shape
        static = self.group.masked_fill(self.group < frames, frames - 1) - frames
        # A static place is in two frames at least.
        clustered = clustered_means(x, self.stands, static, shares[frames:], [width] * frames, len(x) // 2)
        centre = torch.where(static < 0, centre, clustered)
        kept = centre == torch.arange(len(x), device=x.device)
        slot = centre[self.stands]
        slot = torch.where(slot < 0, -1, (kept.cumsum(0) - 1)[slot.clamp(min=0)])
        return Selection(len(x), torch.nonzero_static(kept, size=budget)[:, 0], slot)


def clustered_means(
    x: Tensor, stands: Tensor, group: Tensor, counts: Tensor, sizes: Sequence[int], most: int
) -> Tensor:
    """(N,) long: cluster the means of merged tokens by density; the centre that each of them flows into, -1 for others.

    Parameters
    ----------
    x
        (N, D).
    stands
        (N,) long: the token that each is merged into.
    group
        (N,) long: of those tokens, which group each is clustered in, 0 to G - 1; -1 for all other tokens.
    counts
        (G,) long: clusters of every group.
    sizes, most
        How many each group, and how many all groups together, have at most; on the CPU they are counted.
    """
    n, there = len(x), group >= 0
    most = most if queues(x) else int(there.sum())
    at = torch.nonzero_static(there, size=most, fill_value=n)[:, 0]
    number = torch.where(there, there.cumsum(0) - 1, -1)[stands]
    means = group_sums(x, number, most).div_(counts_of(number, most).clamp_(min=1)[:, None])
    # Behind the last token stands what is none.
    group, centre = (
        torch.nn.functional.pad(values, (0, 1), value=-1) for values in (group, torch.full_like(group, -1))
    )
    joined = kernels.density_clusters(means, group[at], counts, NEIGHBOURS, sizes)
    reached = torch.nn.functional.pad(at, (0, 1), value=-1)[joined]
    return centre.index_copy_(0, at, reached)[:n]


def static_units(places: Places, window: Tensor, likeness: Tensor, least: float, budget: int) -> Units:
    """Make one unit of every place whose `likeness` in a window is above `least`, and one of every other token.

    Where that leaves fewer units than the budget, the least alike of these places are taken apart again.

    Parameters
    ----------
    places
        Of the video.
    window
        (T,) long, ascending: the window of every frame.
    likeness
        (W, P), minus infinity where a token is missing; W is the number of windows or more.
    least, budget
        Numbers.
    """
    frames, tokens = len(window), torch.arange(len(places.at), device=window.device)
    spared = (counts_of(window, len(likeness)) - 1).clamp_(min=0)[:, None]  # tokens, of a static place
    static = (likeness > least) & (spared > 0)
    lacking = budget - len(tokens) + (spared * static).sum()
    ranked = likeness.masked_fill(~static, torch.inf).flatten().sort(stable=True).indices
    gained = (spared * static).flatten()[ranked]
    static = torch.zeros_like(static.flatten()).index_copy_(
        0, ranked, (gained > 0) & (gained.cumsum(0) - gained >= lacking)
    )
    within = places.of_tokens(static.view_as(likeness)[window])
    first = torch.searchsorted(window, window)  # frame of its window
    stands = torch.where(within, places.of_tokens(places.token[first]), tokens)
    group = torch.where(within, frames + window[places.frame], places.frame)
    return Units(places, stands, group.masked_fill_(stands != tokens, -1))
