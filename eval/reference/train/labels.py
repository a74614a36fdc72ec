"""What every visual token shows, as classes: targets of the auxiliary losses.

Answers alone teach a small decoder to bind words to places only slowly. Asking each visual token for the words of what
it shows is faster, and it uses the decoder's own word embeddings, so that no extra weights are shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.tasks.clips.clip import DIRECTIONS, SIDE, Clip, cells
from eval.tasks.clips.questions import TIMES, part_of
from eval.tasks.scenes.scene import Thing
from eval.tasks.scenes.vocabulary import COLOURS, DIGITS, GRID, NUMBERS, PATCH, SHAPES, SIGN_COLOURS, WORDS

ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "colour": (*COLOURS, *SIGN_COLOURS),
    "shape": (*SHAPES, "sign"),
    "text": (*DIGITS, *WORDS, *NUMBERS),
    "motion": tuple(DIRECTIONS),
}
"""Label columns. Class 0 is "none", class i + 1 the i-th word."""

COLUMN: Final = {name: column for column, name in enumerate(ATTRIBUTES)}

EVENTS: Final = (
    "not asked about",
    "always visible",
    *(f"appears: {t}" for t in TIMES),
    *(f"disappears: {t}" for t in TIMES),
)
"""Classes of :func:`event_labels`."""


def word_id(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """Return the token id of a word; raises ValueError if it is not a single token."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"the word {word!r} takes {len(ids)} tokens; train the tokenizer on it so that it takes one")
    return int(ids[0])


def word_ids(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of each attribute's classes; the pad token stands for "none"."""
    return [
        torch.tensor([tokenizer.pad_token_id, *(word_id(tokenizer, word) for word in words)])
        for words in ATTRIBUTES.values()
    ]


def scene_labels(things: Sequence[Thing], patches: int = GRID * GRID) -> NDArray[np.uint8]:
    """Classes of the patches of a scene, ``(patches, 4)``, columns as :data:`ATTRIBUTES`."""
    labels = np.zeros((patches, len(ATTRIBUTES)), np.uint8)
    for thing in things:
        if thing.role != "distractor":
            for column, word in enumerate((thing.colour, thing.name, thing.text)):
                if word:
                    labels[list(thing.patches), column] = list(ATTRIBUTES.values())[column].index(word) + 1
    return labels


def clip_labels(clip: Clip) -> NDArray[np.uint8]:
    """Classes of the visual tokens of a clip, ``(length / 2 * 64, 4)``, columns as :data:`ATTRIBUTES`."""
    labels = np.zeros((clip.length // 2 * (SIDE // PATCH) ** 2, len(ATTRIBUTES)), np.uint8)
    for actor in clip.objects:
        words = {"colour": actor.colour, "shape": actor.name, "motion": actor.direction}
        row = [ATTRIBUTES[name].index(words[name]) + 1 if words.get(name) else 0 for name in ATTRIBUTES]
        labels[list(cells(actor, clip.length))] = row
    return labels


def event_labels(clip: Clip) -> Tensor:
    """When the object that each visual token of a clip shows appears or disappears, ``(N,)`` of :data:`EVENTS`."""
    labels = torch.zeros(clip.length // 2 * (SIDE // PATCH) ** 2, dtype=torch.long)
    for actor in clip.objects:
        event = 1
        if actor.first > 0:
            event = 2 + TIMES.index(part_of(actor.first, clip.length))
        elif actor.last < clip.length:
            event = 2 + len(TIMES) + TIMES.index(part_of(actor.last, clip.length))
        labels[list(cells(actor, clip.length))] = event
    return labels
