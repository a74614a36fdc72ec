"""Looking ahead: the attention that a decoder layer would compute if no token left on entering it.

Its attention module is called and stopped once queries and keys are made and rotated, which works for every family.
Projections compute no more of them than is looked at: keys, and the query of the last token of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from vtc.engine.hooks import Hooks
from vtc.engine.recorder import UNSEEN, Recording, recording
from vtc.errors import StateError

__all__ = ["look_ahead", "spare_projections"]

_LAST: ContextVar[torch.Tensor | None] = ContextVar("vtc_last_of_prompt", default=None)
"""(B,) place of the last token of the prompt, while a layer is looked into."""


class _SeenError(Exception):
    """Raised to end a call of an attention module once its queries and keys were seen."""


@torch.no_grad()
def look_ahead(attention: nn.Module, arguments: Mapping[str, Any], last: torch.Tensor, see: Recording) -> None:
    """Call an attention module with these arguments, let `see` see its queries and keys, and stop it there.

    Parameters
    ----------
    attention, arguments
    last : LongTensor (B,)
        Place of the last token of the prompt in every row.
    see : callable
        As for `recording`.

    Raises
    ------
    StateError
        The module ran without its attention being seen.
    """

    def see_and_stop(query: Any, key: Any, value: Any, mask: Any, scaling: float, kwargs: Mapping[str, Any]) -> None:
        see(query, key, value, mask, scaling, kwargs)
        raise _SeenError

    token = _LAST.set(last)
    try:
        with recording({attention: see_and_stop}):
            attention(**arguments)
    except _SeenError:
        return
    finally:
        _LAST.reset(token)
    raise StateError(f"an attention layer of the decoder ran without its attention being seen: {UNSEEN}")


def spare_projections(hooks: Hooks, attention: nn.Module) -> None:
    """Let the projections of an attention module, while it is looked into, compute only what is looked at."""
    for name, around in (("q_proj", _last_query), ("v_proj", _no_value)):
        projection = getattr(attention, name, None)
        if isinstance(projection, nn.Module):
            hooks.wrap(projection, "forward", around)


def _last_query(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    last = _LAST.get()
    if last is None:
        return original(*args, **kwargs)
    rows = torch.arange(len(last), device=last.device)
    one = original(args[0][rows, last][:, None])
    return one.new_zeros(*args[0].shape[:2], one.shape[2]).index_put((rows, last), one[:, 0])


def _no_value(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _LAST.get() is None:
        return original(*args, **kwargs)
    one = original(args[0][:, :1])
    return one.new_zeros(*args[0].shape[:2], one.shape[2])
