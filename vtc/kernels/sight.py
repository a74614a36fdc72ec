"""Who sees whom in an attention layer, said without a matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Sight"]


@dataclass(frozen=True, eq=False)
class Sight:
    """Who sees whom by where they stand: a query sees the keys that do not stand behind it.

    Attributes
    ----------
    queries : LongTensor (B, Q)
        Where every query stands in its sequence; -1 for padding, which sees nothing.
    keys : LongTensor (B, P)
        The same for every key; -1 for padding, which nobody sees. Those of the queries are the last, where blocks are
        given.
    window : int or None
        How far back a query looks.
    blocks : LongTensor (B, Q) or None
        Queries that see each other in both directions share a number >= 0.
    """

    queries: Tensor
    keys: Tensor
    window: int | None = None
    blocks: Tensor | None = None

    def __call__(self, part: slice, room: int) -> Tensor:
        """(B, 1, R, room) bool for the queries of `part`."""
        keys, queries = self.positions(room)[:, None], self.queries[:, part, None]
        allowed = keys <= queries
        if self.window is not None:
            allowed &= queries - keys < self.window
        blocks = self.key_blocks(room)
        if self.blocks is not None and blocks is not None:
            allowed |= (blocks[:, None] == self.blocks[:, part, None]) & (blocks[:, None] >= 0)
        allowed &= (keys >= 0) & (queries >= 0)
        return allowed[:, None]

    def row(self, row: int) -> Sight:
        """That of one row of the batch."""
        blocks = None if self.blocks is None else self.blocks[row : row + 1]
        return Sight(self.queries[row : row + 1], self.keys[row : row + 1], self.window, blocks)

    def positions(self, room: int) -> Tensor:
        """(B, room): a sliding cache has forgotten the first keys, a static one has room behind the last."""
        return _fitted(self.keys, room)

    def key_blocks(self, room: int) -> Tensor | None:
        """(B, room): the blocks of the keys, -1 for those of an earlier conversation."""
        if self.blocks is None:
            return None
        earlier = self.keys.shape[1] - self.blocks.shape[1]
        return _fitted(nn.functional.pad(self.blocks, (earlier, 0), value=-1), room)


def _fitted(table: Tensor, room: int) -> Tensor:
    return nn.functional.pad(table[:, -room:], (0, max(0, room - table.shape[1])), value=-1)
