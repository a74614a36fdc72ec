"""What every patch shows, in words: targets of the auxiliary loss that ties visual tokens to the vocabulary.

Answers alone do not teach a small decoder to bind words to places in reasonable time; asking each projected visual
token for the words of what it shows does, and it uses the decoder's own word embeddings, so nothing extra is shipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.tasks.scenes.scene import Thing
from eval.tasks.scenes.vocabulary import COLOURS, DIGITS, GRID, NUMBERS, SHAPES, SIGN_COLOURS, WORDS

GROUPS: tuple[tuple[str, ...], ...] = (
    (*COLOURS, *SIGN_COLOURS),
    (*SHAPES, "sign"),
    (*DIGITS, *WORDS, *NUMBERS),
)
"""Colour, shape and writing; label 0 of each group means none."""


SIDES: tuple[tuple[str, str], ...] = (("left", "right"), ("top", "bottom"))
"""What every patch is besides what it shows; position embeddings alone tell a small decoder too little about places."""


def side_ids(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of the two words of each of :data:`SIDES`."""
    return [torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in pair]) for pair in SIDES]


def side_labels(patches: Tensor) -> Tensor:
    """On which side of the scene each patch number lies: ``(..., 2)`` long, columns as :data:`SIDES`."""
    return torch.stack([patches % GRID >= GRID // 2, patches // GRID >= GRID // 2], -1).long()


def word_ids(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of each group, the pad token first (it stands for none).

    Raises
    ------
    ValueError
        If a word is not a single token of this tokenizer.
    """
    groups = []
    for words in GROUPS:
        encoded = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
        for word, ids in zip(words, encoded, strict=True):
            if len(ids) != 1:
                raise ValueError(
                    f"the word {word!r} takes {len(ids)} tokens; train the tokenizer on it so that it takes one"
                )
        groups.append(torch.tensor([tokenizer.pad_token_id, *(ids[0] for ids in encoded)]))
    return groups


def patch_labels(things: Sequence[Thing]) -> Tensor:
    """Labels of one scene's patches, ``(GRID * GRID, 3)`` uint8, columns as :data:`GROUPS`."""
    labels = torch.zeros(GRID * GRID, len(GROUPS), dtype=torch.uint8)
    for thing in things:
        if thing.role == "distractor":
            continue
        row = [GROUPS[0].index(thing.colour) + 1, GROUPS[1].index(thing.name) + 1]
        row.append(GROUPS[2].index(thing.text) + 1 if thing.text else 0)
        labels[list(thing.patches)] = torch.tensor(row, dtype=torch.uint8)
    return labels
