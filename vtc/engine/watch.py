"""Watching an encoder run: the hooks on towers and their layers, and what they tell the run that they belong to.

Hooks stay on the modules while a model is compressed; which run they serve is a matter of the thread or task.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vtc.core.observations import VisionAttention, VisionHidden
from vtc.engine.in_tower import TowerPass
from vtc.engine.masks import allowed_keys

__all__ = [
    "ENCODING",
    "Watch",
    "attention_observer",
    "enter_block",
    "hidden_observer",
    "leave_cells",
    "leave_tower",
    "see_hidden",
    "see_pixels",
]


@dataclass(eq=False)
class Watch:
    """What is to be seen of the encoder that this thread or task runs."""

    pixels: list[torch.Tensor] | None = None
    hidden: dict[nn.Module, Callable[[Any], None]] = field(default_factory=dict)
    tower: TowerPass | None = None
    begin: Callable[[torch.Tensor], TowerPass] | None = None  # makes `tower`, of what enters the first layer
    packed: list[int] | None = None  # patches of every picture, where a mask divides one sequence into pictures

    def borders(self, device: torch.device) -> torch.Tensor | None:
        """Return the borders (S + 1,) of the pictures that a mask keeps apart, of the patches that are left."""
        if self.packed is None:
            return None
        borders = torch.tensor([0, *itertools.accumulate(self.packed)], device=device)
        return borders if self.tower is None else self.tower.shorten_borders(borders)

    def extra_mask(self, module: nn.Module, query: torch.Tensor) -> torch.Tensor | None:
        """Return what is added to the mask of an attention module of the tower."""
        return None if self.tower is None else self.tower.attention_bias(module, query)


ENCODING: ContextVar[Watch | None] = ContextVar("vtc_encoding", default=None)
"""The run of this thread or task."""


def attention_observer(layer: int, prefix: int, see: Any) -> Callable[..., None]:
    """Make what hands the attention of a layer, called with the arguments of a `Recording`, to `see`."""

    def record(query: Any, key: Any, value: Any, mask: Any, scaling: float, kwargs: Mapping[str, Any]) -> None:
        # A flash kernel gets all images of a packed tower in one call, and so does any of Pixtral's; the others get
        # them one by one.
        watch = ENCODING.get()
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None and watch is not None:
            bounds = watch.borders(query.device)
        allowed = allowed_keys(mask) if bounds is None else None
        sizes = None if watch is None or watch.tower is None else watch.tower.sizes
        if sizes is None:
            bias = None
        elif allowed is None:
            bias = sizes.log().to(query)
        else:
            bias = mask[:, 0, 0].masked_fill(~allowed[:, 0, 0], 0.0)
        see((VisionAttention, layer), VisionAttention(query, key, value, scaling, allowed, bounds, prefix, bias))

    return record


def hidden_observer(layer: int, prefix: int, see: Any) -> Callable[[Any], None]:
    """Make what hands the output of a layer to `see`."""

    def record(output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        see((VisionHidden, layer), VisionHidden(hidden[None] if hidden.dim() == 2 else hidden, prefix))

    return record


@torch.no_grad()
def see_hidden(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Hand the output of a layer to the run that watches it."""
    watch = ENCODING.get()
    if watch is not None and module in watch.hidden:
        watch.hidden[module](output)


def enter_block(
    layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let the stages on entering a layer of the tower choose."""
    watch = ENCODING.get()
    if watch is None or watch.begin is None:
        return None
    if watch.tower is None:
        hidden = args[0] if args else kwargs["hidden_states"]
        watch.tower = watch.begin(hidden[None] if hidden.dim() == 2 else hidden)
    return watch.tower.enter(layer, args, kwargs)


def leave_tower(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Put the output of a tower back to full length."""
    watch = ENCODING.get()
    if watch is not None and watch.tower is not None:
        watch.tower.leave(output)


def leave_cells(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    """Put the tokens that a tower made of cells back to full length."""
    watch = ENCODING.get()
    return None if watch is None or watch.tower is None else watch.tower.restore_cells(output)


def see_pixels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note what a tower is given: it gets the pixels without padding and in its own shape."""
    watch = ENCODING.get()
    if watch is not None and watch.pixels is not None:
        values = (*args, *kwargs.values())
        watch.pixels.append(next(value for value in values if isinstance(value, torch.Tensor)).detach())
