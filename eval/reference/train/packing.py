"""Pack many questions behind one image: the image is read once, and every question sees the image and itself only.

A packed row is ``prefix | question answer | question answer | ...``. The prefix (the template's opening with the image
placeholders) is causal; each question attends to the prefix and to its own past, and its positions restart right after
the prefix. So each question computes exactly what it would compute alone in ``generate``, at a fraction of the price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.tasks.scenes.questions import Question, ask
from eval.tasks.scenes.scene import Scene, Thing
from eval.tasks.scenes.vocabulary import COLOURS, GRID, KINDS, SHAPES, SIGN_COLOURS

IGNORE = -100
EOS_WEIGHT = 0.1  # the end of an answer is learned in minutes and then only dilutes the loss

_NO_IMAGE = np.empty((0, 0, 3), np.uint8)  # questions need the things of a scene, not its pixels


@dataclass(frozen=True)
class PackedText:
    """The question part of a packed batch; ``T`` tokens per row.

    Attributes
    ----------
    ids, labels : LongTensor (B, T)
        Tokens, and the token to predict *at* each place (:data:`IGNORE` where none is).
    positions : LongTensor (B, T)
        Position ids, restarting at the length of the prefix.
    segments : LongTensor (B, T)
        Number of the question from 1; 0 is padding.
    spots : LongTensor (M, 2)
        Row and place of what points at the scene: each question's first prediction, and every colour or shape word
        that names something in the scene.
    focus : BoolTensor (M, patches)
        The patches that each of them points at: what the answer speaks about, or everything that the word fits.
    mentions : BoolTensor (M,)
        Which of the spots are words.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    spots: Tensor
    focus: Tensor
    mentions: Tensor


def bare_scene(things: tuple[Thing, ...], split: str, seed: int, index: int) -> Scene:
    """A scene without pixels, rebuilt from cached things."""
    return Scene(_NO_IMAGE, things, split, seed, index)  # type: ignore[arg-type]


class Packer:
    """Turns questions into packed rows of a fixed length.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The shared tokenizer.
    prefix_length : int
        Tokens before the first question, image included: where positions restart.
    length : int
        Tokens for questions per row; a fixed shape is what ``torch.compile`` likes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix_length: int, length: int) -> None:
        self.tokenizer = tokenizer
        self.prefix_length = prefix_length
        self.length = length
        self._known: dict[str, list[int]] = {}
        self.end_of_turn = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self.eos = int(tokenizer.eos_token_id)
        plurals = {f"{shape}s": shape for shape in SHAPES}
        names = {word: word for word in (*COLOURS, *SIGN_COLOURS, *SHAPES, "sign")} | plurals
        self._names = {self._ids(word)[0]: name for word, name in names.items()}

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def turn(self, question: Question) -> tuple[list[int], list[int]]:
        """Prompt and answer tokens as the chat template lays them out after the image."""
        return [*self._ids(question.text), self.end_of_turn], [*self._ids(question.answer), self.eos]

    def pack(self, rows: Sequence[Sequence[Question]], scenes: Sequence[Scene] = ()) -> PackedText:
        """Pack one row per image, leaving out questions that do not fit; ``scenes`` are needed for the pointing."""
        spots: list[tuple[int, int]] = []
        focus: list[Tensor] = []
        mentions: list[bool] = []
        shape = (len(rows), self.length)
        ids, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        positions = np.full(shape, self.prefix_length, np.int64)
        for row, questions in enumerate(rows):
            start = 0
            for number, question in enumerate(questions, 1):
                prompt, answer = self.turn(question)
                tokens = prompt + answer[:-1]  # nothing is predicted from the end token
                stop = start + len(tokens)
                if stop > self.length:
                    break
                ids[row, start:stop] = tokens
                segments[row, start:stop] = number
                positions[row, start:stop] = np.arange(self.prefix_length, self.prefix_length + len(tokens))
                labels[row, stop - len(answer) : stop] = answer
                if scenes:
                    pointers = [(stop - len(answer), question.focus, False)]
                    for place, token in enumerate(prompt, start):
                        name = self._names.get(token)
                        fitting = [i for i, t in enumerate(scenes[row].things) if name in (t.colour, t.name)]
                        pointers.append((place, tuple(fitting), True))
                    for place, things, is_word in pointers:
                        if things:
                            spots.append((row, place))
                            focus.append(patches_of(scenes[row], things))
                            mentions.append(is_word)
                start = stop
        return PackedText(
            *(torch.from_numpy(array) for array in (ids, labels, positions, segments)),
            spots=torch.tensor(spots, dtype=torch.long).view(-1, 2),
            focus=torch.stack(focus) if focus else torch.zeros(0, GRID * GRID, dtype=torch.bool),
            mentions=torch.tensor(mentions, dtype=torch.bool),
        )

    def ask_and_pack(
        self, scenes: Sequence[Scene], per_scene: int, seed: int, kinds: Sequence[str] = KINDS
    ) -> PackedText:
        """Ask fresh questions (another ``seed``, other questions) and pack them."""
        return self.pack([ask(scene, per_scene, seed=seed, kinds=kinds) for scene in scenes], scenes)


def patches_of(scene: Scene, things: Sequence[int]) -> Tensor:
    """Which patches show any of the things with these indices, ``(GRID * GRID,)`` bool."""
    mask = torch.zeros(GRID * GRID, dtype=torch.bool)
    for index in things:
        mask[list(scene.things[index].patches)] = True
    return mask


def attention_mask(prefix_length: int, segments: Tensor) -> Tensor:
    """Who sees whom: ``(B, 1, P + T, P + T)`` bool, True = may attend (see the module's text)."""
    batch, length = segments.shape
    total = prefix_length + length
    full = torch.cat([segments.new_zeros(batch, prefix_length), segments], 1)
    prefix_key = torch.arange(total) < prefix_length
    same = full[:, :, None] == full[:, None, :]
    mask = (same | prefix_key) & torch.ones(total, total, dtype=torch.bool).tril()
    return mask[:, None]
