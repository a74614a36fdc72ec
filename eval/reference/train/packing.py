"""Pack many questions behind one image, so that the image is encoded once.

A packed row is ``prefix | question answer | question answer | ...``, or with several turns
``prefix | question answer question answer | ...``. The prefix (the chat template's opening and the
visual tokens) is causal. Each question attends to the prefix and to its own past, and its positions restart after the
prefix, so it computes exactly what it would compute alone in ``generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.tasks.clips.clip import Actor
from eval.tasks.scenes.questions import Question
from eval.tasks.scenes.scene import Thing
from eval.tasks.scenes.vocabulary import COLOURS, GRID, SHAPES, SIGN_COLOURS

IGNORE = -100

Shown = Sequence[tuple[Thing | Actor, Sequence[int]]]
"""The things of one image or clip, each with the indices of the patches (or visual tokens) that show it."""


@dataclass(frozen=True)
class PackedText:
    """The question part of a packed batch, ``T`` tokens per row.

    ``segments`` number the questions of a row from 1, 0 is padding. ``pointers`` are what the pointing loss reads: each
    question's first prediction, and the colour and shape words (``mentions``) that name something in the image. They
    should point at ``focus``: the patches of what the answer speaks about, or of everything that the word fits.
    """

    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T): the token to predict at each place, IGNORE where none is
    positions: Tensor  # (B, T), restarting at the length of the prefix
    segments: Tensor  # (B, T)
    pointers: Tensor  # (M, 2): row and place
    focus: Tensor  # (M, patches) bool
    mentions: Tensor  # (M,) bool


class Packer:
    """Turn questions into packed rows of ``length`` tokens whose positions restart at ``prefix_length``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix_length: int, length: int) -> None:
        self.tokenizer, self.prefix_length, self.length = tokenizer, prefix_length, length
        self.end_of_turn = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self.eos = int(tokenizer.eos_token_id)
        words = {word: word for word in (*COLOURS, *SIGN_COLOURS, *SHAPES, "sign")} | {f"{s}s": s for s in SHAPES}
        self._names = {self._ids(word)[0]: name for word, name in words.items()}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def turn(self, question: Question) -> tuple[list[int], list[int]]:
        """Return prompt and answer tokens as the chat template lays them out after the image."""
        return [*self._ids(question.text), self.end_of_turn], [*self._ids(question.answer), self.eos]

    def pack(
        self,
        rows: Sequence[Sequence[Question]],
        shown: Sequence[Shown] = (),
        patches: int = GRID * GRID,
        turns: int = 1,
    ) -> PackedText:
        """Pack one row per image, leaving out questions that do not fit; the pointing loss needs ``shown``.

        So many successive questions are ``turns`` of one conversation, later ones behind the earlier answers.
        """
        pointers: list[tuple[int, int]] = []
        focus: list[Tensor] = []
        mentions: list[bool] = []
        shape = (len(rows), self.length)
        ids, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels, positions = np.full(shape, IGNORE, np.int64), np.full(shape, self.prefix_length, np.int64)
        for row, questions in enumerate(rows):
            start, position = 0, self.prefix_length
            for number, question in enumerate(questions):
                prompt, answer = self.turn(question)
                # Nothing is predicted from the end token, but a second turn sees it.
                tokens = prompt + (answer if turns > 1 else answer[:-1])
                stop = start + len(tokens)
                if stop > self.length:
                    break
                if number % turns == 0:
                    position = self.prefix_length
                ids[row, start:stop] = tokens
                segments[row, start:stop] = number // turns + 1
                positions[row, start:stop] = np.arange(position, position + len(tokens))
                position += len(tokens)
                first = start + len(prompt) - 1  # predicts the first word of the answer
                labels[row, first : first + len(answer)] = answer
                if shown:
                    candidates = [(first, question.focus, False)]
                    for place, token in enumerate(prompt, start):
                        name = self._names.get(token)
                        fitting = [i for i, (thing, _) in enumerate(shown[row]) if name in (thing.colour, thing.name)]
                        candidates.append((place, tuple(fitting), True))
                    for place, things, is_word in candidates:
                        owned = [patch for thing in things for patch in shown[row][thing][1]]
                        if owned:
                            pointers.append((row, place))
                            focus.append(
                                torch.zeros(patches, dtype=torch.bool).index_fill_(0, torch.tensor(owned), True)
                            )
                            mentions.append(is_word)
                start = stop
        return PackedText(
            *(torch.from_numpy(array) for array in (ids, labels, positions, segments)),
            pointers=torch.tensor(pointers, dtype=torch.long).view(-1, 2),
            focus=torch.stack(focus) if focus else torch.zeros(0, patches, dtype=torch.bool),
            mentions=torch.tensor(mentions, dtype=torch.bool),
        )


def attention_mask(prefix_length: int, segments: Tensor) -> Tensor:
    """Return the mask of a packed batch, ``(B, 1, P + T, P + T)`` bool, True where a query may attend to a key."""
    batch, length = segments.shape
    total = prefix_length + length
    full = torch.cat([segments.new_zeros(batch, prefix_length), segments], 1)
    in_prefix = torch.arange(total) < prefix_length
    same = full[:, :, None] == full[:, None, :]
    return ((same | in_prefix) & torch.ones(total, total, dtype=torch.bool).tril())[:, None]
