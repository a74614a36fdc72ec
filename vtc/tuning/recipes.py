"""Recipes: how the modules of every trained method begin, and what they learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vtc.selectors.learned import Modules, crosslmm, vision_remember, vtc_asked
from vtc.selectors.learned.atp import training as atp
from vtc.selectors.learned.llava_mini import training as llava_mini
from vtc.selectors.learned.pixelrefer import training as pixelrefer

__all__ = ["TRAINABLE", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How the modules of one method are trained.

    Attributes
    ----------
    begin
        Makes them: ``begin(shape, projector, decoder, seed=..., **options)``.
    study, loss
        For modules that no gradient of the answer reaches: ``study(module, read)`` finds out about a sample what
        ``loss(module, found)`` learns from, with ``read()`` giving the loss of its answer. None: the loss of the answer
        is what they learn from.
    answers
        Whether an answer is read behind the prompt; without one no answer is needed, and how many tokens stay does not
        matter: all do.
    options
        Of the method, while it is trained.
    """

    begin: Callable[..., tuple[Modules, nn.Module]]
    study: Callable[[Any, Callable[[], Tensor]], Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    answers: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


TRAINABLE: Mapping[str, Recipe] = {
    "atp": Recipe(atp.begin, atp.study, atp.loss),
    "crosslmm": Recipe(crosslmm.begin),
    "llava-mini": Recipe(llava_mini.begin),
    "pixelrefer": Recipe(pixelrefer.begin),
    "vision-remember": Recipe(vision_remember.begin),
    "vtc-asked": Recipe(vtc_asked.begin, vtc_asked.study, vtc_asked.loss, answers=False, options={"imitate": True}),
}
"""Methods whose modules can be trained."""
