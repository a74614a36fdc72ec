"""Tiny models that tests share, and what these say untouched.

A test of the matrix compresses a model, asks it and restores it. Building the model and asking it untouched costs more
than that, and is the same for all methods. Whoever borrows a model hands it back as it was: `check` looks after every
test. Tests that look for what a compression leaves behind take a model of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import vtc
from tests import tiny

_Key = tuple[str, str, torch.dtype]

WRITTEN_BY_FORWARD = ("rope_deltas",)
"""Attributes that transformers itself writes in every forward."""


class SharedCase(tiny.TinyCase):
    """A case whose model may be compressed if it is restored, and may not be changed otherwise."""

    @functools.cached_property
    def at_first(self) -> tuple[Any, ...]:
        return _state(self.model)

    @functools.cached_property
    def _said(self) -> dict[str, Any]:
        return {}

    def plain(self, kind: str) -> Any:
        """What the untouched model answers to `batch(kind)`."""
        return self.once(kind, lambda: self.model(**self.batch(kind)))

    @torch.no_grad()
    def once(self, question: str, ask: Callable[[], Any]) -> Any:
        """What the untouched model answers when asked; `question` tells it from other ones."""
        if question not in self._said:
            assert not vtc.is_compressed(self.model), "ask the untouched model before compressing it"
            self._said[question] = ask()
        return self._said[question]


_CASES: dict[_Key, SharedCase] = {}
_LENT: set[_Key] = set()


def case(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> SharedCase:
    """The model of this process of a family, with this attention implementation everywhere."""
    key = (name, attention, dtype)
    if key not in _CASES:
        own = tiny.build(name, dtype=dtype)
        own.model.set_attn_implementation(attention)
        _CASES[key] = SharedCase(own.family, own.model, own.seed)
        # Whatever transformers sets up lazily is there, in both towers where there are two.
        _CASES[key].plain("mixed" if "mixed" in own.family.kinds else "single")
        _ = _CASES[key].at_first
    _LENT.add(key)
    return _CASES[key]


def check() -> None:
    """Refuse that something is left on a model that was borrowed; the next test gets another one."""
    lent = {key: _CASES[key] for key in _LENT}
    _LENT.clear()
    changed = [key for key, own in lent.items() if _state(own.model) != own.at_first]
    for key in changed:
        del _CASES[key]
    assert not changed, f"the test left something on the shared models {changed}"


def _state(model: Any) -> tuple[Any, ...]:
    modules = [
        (
            type(module),
            module.training,
            module.__dict__.keys() - WRITTEN_BY_FORWARD,
            len(module._forward_hooks) + len(module._forward_pre_hooks),
        )
        for module in model.modules()
    ]
    weights = list(model.parameters())
    norms = torch.stack(torch._foreach_norm(weights)).tolist()
    gradients = [(weight.requires_grad, weight.grad is None) for weight in weights]
    return modules, norms, gradients, model.config._attn_implementation
