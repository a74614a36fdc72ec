"""Actions: what happens to the tokens that a method does not keep as they are."""

from __future__ import annotations

import enum

__all__ = ["Action"]


class Action(str, enum.Enum):
    """Operation of a stage. Methods declare it, so that impossible sites are refused before a model is touched."""

    KEEP = "keep"
    """Keep K of N tokens and drop the others."""

    MERGE = "merge"
    """Replace N tokens by K weighted sums of them: a sparse K x N matrix, see `Selection`."""

    REPLACE = "replace"
    """Replace N tokens by K new ones that a trained module computes from them; they stand at K of the N places."""

    UPDATE = "update"
    """Update the hidden states of some tokens, of which none leaves, by what was remembered of the pictures."""

    EVICT = "evict"
    """Remove entries from key-value caches, per layer and optionally per head."""

    RESAMPLE = "resample"
    """Replace a picture that yields N tokens by a smaller one that yields K, a grid of its own."""
