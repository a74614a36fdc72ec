"""Train the tokenizer that all reference models share: byte-level BPE over the questions that the tasks can ask.

Byte-level, so that any text can be written; trained on the tasks' own sentences, so that every word of them is one
token. A leading space is added to every piece of text and removed when decoding: "red" at the start of an answer and
" red" inside a question are then the same token, which lets a small decoder copy words.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.tasks.scenes.questions import ask, sentences
from eval.tasks.scenes.scene import make_scene

SPECIAL = (
    "<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

SPARE_WORDS = (
    "book", "park", "shop", "rain", "door", "lamp", "bread", "train", "hotel", "music", "pizza", "queen", "25", "40",
    "61", "74", "90", "98",
)  # fmt: skip
"""Single tokens that no scene shows at present, for signs of other tasks."""

VIDEO_SENTENCES = (
    "Which way does the red star move?", "In which direction does the blue cup move?",
    "Does the circle move left or right?", "It moves up.", "It moves down.", "It does not move.", "still", "stays",
    "left", "right", "up", "down", "diagonally", "What appeared first?", "What appeared last?",
    "Which object appears before the cup?", "Which object appears after the star?", "What disappeared?",
    "Which object disappears first?", "Which object disappears last?", "What came in second?", "third", "fourth",
    "How many times does the square blink?", "How many times did the heart flash?", "once", "twice", "three times",
    "never", "When does the triangle appear?", "When did the cup disappear?", "at the start", "in the middle",
    "at the end", "In which frame does it appear?", "from frame to frame", "What happens in the video?",
    "What happened to the cup?", "Does the sign change?", "What does the sign say first?",
    "What does the sign say at the end?", "beginning", "changes", "changed", "Which object moves?",
    "Which object moved to the left?", "Which object is moving?", "How many objects move?",
    "What colour is the moving object?", "What colour is the object that appears first?", "What shape appears last?",
    "the first one", "the second one", "earlier", "later", "while", "then", "during", "until", "seconds", "second",
    "minute", "clip", "video", "scene", "image", "photo", "picture", "frame", "frames", "order", "event", "events",
    "time", "faster", "slower", "fast", "slow", "grows", "shrinks", "larger", "smaller", "bigger", "largest",
    "smallest", "rotates", "turns", "jumps", "falls", "rises", "enters", "leaves", "crosses", "towards", "away from",
    "clockwise", "same", "different", "Did the red cup move before the blue star?",
    "Was there a green heart in the video?", "Were there", "has", "had", "have", "it was", "both", "none", "nothing",
    "something", "anything", "everything", "all", "any", "some", "each", "every", "only", "near", "next to",
    "between", "behind", "in front of", "inside", "outside", "under", "over", "top", "bottom", "centre", "center",
    "corner", "side", "edge", "background", "Describe the picture.", "Describe the video.", "What is in the picture?",
    "What do you see?", "Please answer with one word.", "Answer the question using a single word or phrase.", "and",
    "or", "not", "no", "yes", "this", "that", "these", "those", "with", "without", "for", "by", "from", "as", "be",
    "can", "could", "will", "would", "should", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "zero", "many", "much", "white", "black", "grey", "gray", "brown", "pink", "letter", "letters", "word",
    "words", "text", "digit", "number", "numbers", "person", "man", "woman", "cat", "dog", "car", "house", "tree",
    "table", "A.", "B.", "C.", "D.", "?", ".", ",",
)  # fmt: skip
"""Words of the video tasks and some everyday ones, beyond what the scenes' questions bring."""


def corpus(scenes: int = 400) -> Iterator[str]:
    """Yield the sentences to train on, the same at every call."""
    for index in range(scenes):
        for question in ask(make_scene("train", 1, index), 18):
            yield question.text
            yield question.answer
    for _ in range(4):  # rare words must be seen often enough to be merged
        yield from sentences()
        yield from VIDEO_SENTENCES
        yield from SPARE_WORDS


def train(folder: Path) -> None:
    """Train the shared tokenizer; merging stops by itself once every word of the corpus is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=2560,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[token for token in SPECIAL if token not in ("<pad>", "<s>", "</s>")],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
