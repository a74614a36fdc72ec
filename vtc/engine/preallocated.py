"""A layer of a dynamic cache with room behind its entries, so that a step of decoding does not copy those."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

__all__ = ["PreallocatedLayer"]

_ROOM = 64
"""Entries that fit behind those that are there; when they are used up, the layer is copied once."""


class PreallocatedLayer(DynamicLayer):
    """A dynamic layer whose keys and values are views of larger tensors.

    The class of a layer is switched in place. What others do to `keys` and `values` is respected: views of the larger
    tensors that begin or end elsewhere stay such views, and tensors that are none are copied into new ones.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, H, T, d), and return all."""
        if not self.is_initialized or (
            torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad)
        ):
            result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return result
        self.keys = self._append("_key_room", self.keys, key_states)
        self.values = self._append("_value_room", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, entries: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return a view of all entries, in the tensor that has room for them."""
        room: torch.Tensor | None = self.__dict__.get(name)
        length, more = entries.shape[2], new.shape[2]
        start = None if room is None else _start_in(room, entries)
        if room is None or start is None or start + length + more > room.shape[2]:
            start = 0
            room = entries.new_empty(*entries.shape[:2], length + more + _ROOM, entries.shape[3])
            room[:, :, :length] = entries
            setattr(self, name, room)
        stop = start + length
        room[:, :, stop : stop + more] = new
        return room[:, :, start : stop + more]


def _start_in(room: torch.Tensor, entries: torch.Tensor) -> int | None:
    """Return where in `room` the view `entries` begins; None if it is no view of it."""
    if room.untyped_storage().data_ptr() != entries.untyped_storage().data_ptr():
        return None
    same = room.shape[:2] == entries.shape[:2] and room.stride() == entries.stride()
    return int(entries.storage_offset()) // room.stride(2) if same else None
