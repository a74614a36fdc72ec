"""Methods that go on inside the language model: hidden states of some tokens are updated on entering decoder layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .context import VisualContext
from .selection import Selection
from .selector import Selector

__all__ = ["HiddenContext", "UpdatingSelector"]


@dataclass(frozen=True, eq=False)
class HiddenContext:
    """The T tokens of one row that enter a decoder layer, without padding, and the M pictures that were remembered.

    A picture is an image or a video. Tokens that decoder stages dropped are not there any more.

    Attributes
    ----------
    layer
        Decoder layer (0-based) that the tokens enter.
    hidden
        (T, D) hidden states.
    text
        (T,) bool: tokens of the text, generated ones included; the newlines of a picture are none.
    picture
        (T,) long: the picture that a token is a visual token of, -1 for all others.
    slot
        (T,) long: its place among the tokens that the method kept of the picture, -1 for all others.
    sees
        (T, M) bool: whether the picture begins in front of the token, or at it. What attention would hide from a token
        has to stay hidden here, so that a prompt can be read in chunks.
    memories
        What `UpdatingSelector.remember` returned for each of the pictures, in the order of the prompt.
    """

    layer: int
    hidden: Tensor
    text: Tensor
    picture: Tensor
    slot: Tensor
    sees: Tensor
    memories: tuple[Mapping[str, Tensor], ...]


class UpdatingSelector(Selector):
    """A method that chooses before the language model, remembers something, and updates hidden states later on.

    Its first stage is before the decoder, like that of any method. After `select` the method is asked what is to be
    remembered of the picture; a stage with ``Action.UPDATE`` at a decoder layer then calls `update` on entering it,
    whenever tokens do: in a prefill, in every chunk of one, and in every step of decoding. What is remembered lives as
    long as the key-value cache of the conversation, or without one as long as the call.
    """

    @abstractmethod
    def remember(self, ctx: VisualContext, selection: Selection) -> Mapping[str, Tensor] | None:
        """Return tensors that `update` needs of the picture that `selection` was made of; None: it is not remembered.

        Gradients flow through it, where they are wanted.
        """

    @abstractmethod
    def update(self, ctx: HiddenContext) -> Tensor:
        """Return the hidden states (T, D) as the layer is to get them.

        The value of a token must depend on this token and the memories that it sees alone.
        """
