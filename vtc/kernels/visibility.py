"""Attention masks described by token positions instead of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["VisibilityMask"]


@dataclass(frozen=True, eq=False)
class VisibilityMask:
    """Causal attention mask given by positions: a query attends to the keys at its own position and before it.

    Attributes
    ----------
    query_positions : LongTensor (B, Q)
        Position of every query in its sequence; -1 for padding, which attends to nothing.
    key_positions : LongTensor (B, P)
        Position of every key; -1 for padding, which no query attends to. With `blocks`, the last Q keys belong to the
        queries.
    window : int or None
        Length of a sliding window.
    blocks : LongTensor (B, Q) or None
        Queries that share a block number >= 0 attend to each other in both directions.
    """

    query_positions: Tensor
    key_positions: Tensor
    window: int | None = None
    blocks: Tensor | None = None

    def __call__(self, part: slice, key_length: int) -> Tensor:
        """Return the mask (B, 1, R, key_length) bool of the queries of `part`."""
        blocks = None if self.blocks is None else self.blocks[:, part]
        return self._allowed(self.query_positions[:, part], blocks, key_length)

    def rows(self, index: Tensor, key_length: int) -> Tensor:
        """Return the mask (B, 1, R, key_length) bool of the queries at `index` (B, R) long."""
        blocks = None if self.blocks is None else self.blocks.gather(1, index)
        return self._allowed(self.query_positions.gather(1, index), blocks, key_length)

    def _allowed(self, positions: Tensor, blocks: Tensor | None, key_length: int) -> Tensor:
        """Return the mask of queries with these positions and block numbers (B, R)."""
        keys, queries = self.keys_for(key_length)[:, None], positions[:, :, None]
        allowed = keys <= queries
        if self.window is not None:
            allowed &= queries - keys < self.window
        key_blocks = self.key_blocks_for(key_length)
        if blocks is not None and key_blocks is not None:
            allowed |= (key_blocks[:, None] == blocks[:, :, None]) & (key_blocks[:, None] >= 0)
        allowed &= (keys >= 0) & (queries >= 0)
        return allowed[:, None]

    def row(self, row: int) -> VisibilityMask:
        """Return the mask of one row of the batch."""
        blocks = None if self.blocks is None else self.blocks[row : row + 1]
        return VisibilityMask(
            self.query_positions[row : row + 1], self.key_positions[row : row + 1], self.window, blocks
        )

    def keys_for(self, key_length: int) -> Tensor:
        """Return positions (B, key_length) of the keys of a cache.

        A sliding-window cache no longer holds the first keys; a static cache has unused slots behind the last key,
        which count as padding.
        """
        return _fitted(self.key_positions, key_length)

    def key_blocks_for(self, key_length: int) -> Tensor | None:
        """Return block numbers (B, key_length) of the keys of a cache, -1 for keys of an earlier forward pass."""
        if self.blocks is None:
            return None
        earlier = self.key_positions.shape[1] - self.blocks.shape[1]
        return _fitted(nn.functional.pad(self.blocks, (earlier, 0), value=-1), key_length)


def _fitted(table: Tensor, key_length: int) -> Tensor:
    return nn.functional.pad(table[:, -key_length:], (0, max(0, key_length - table.shape[1])), value=-1)
