"""A question about pictures or a video as a prompt, with what processors take badly refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .errors import InputError
from .plain import shown

__all__ = ["chat", "check_question", "image_inputs", "processing"]


def check_question(processor: Any, question: Any) -> None:
    """Refuse a question that would not reach the model as words.

    Raises
    ------
    InputError
        It is no text, cannot be encoded, or holds a word that stands for a picture or video in this model's prompts.
    """
    if not isinstance(question, str):
        raise InputError(f"A question is a text, got {shown(question)}.")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"The question {question!r} holds bytes that are no UTF-8; write it in UTF-8.") from error
    words = {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    if found := sorted(word for word in words if word and word in question):
        raise InputError(
            f"The question holds {', '.join(map(repr, found))}, which stands for a picture or video in the prompts of "
            f"{type(processor).__name__}; leave it out."
        )


def chat(processor: Any, kinds: Sequence[str], question: str) -> str:
    """Return the prompt of one turn that shows media of these kinds ("image", "video") and asks a question.

    Raises
    ------
    InputError
        The question is none (see `check_question`), or the processor has no chat template.
    """
    check_question(processor, question)
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"{type(processor).__name__} has no chat template, so the question cannot be put to the model."
        )
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt


def image_inputs(processor: Any, images: Sequence[Any], question: str) -> Any:
    """Return what the processor makes of pictures and a question about them.

    Raises
    ------
    InputError
        The question is none, the processor has no chat template, or it does not take these pictures.
    """
    prompt = chat(processor, ["image"] * len(images), question)
    sizes = ", ".join(map(_size, images))
    with processing(processor, f"pictures of {sizes} pixels" if len(images) > 1 else f"a picture of {sizes} pixels"):
        return processor(images=list(images), text=[prompt], return_tensors="pt")


def _size(image: Any) -> str:
    """Size of a picture, or shape of an array."""
    for name in ("size", "shape"):  # the size of an array is a number or a function
        if isinstance(size := getattr(image, name, None), tuple):
            return "x".join(map(str, size))
    return type(image).__name__


@contextmanager
def processing(processor: Any, what: str) -> Iterator[None]:
    """Turn what a processor raises into an `InputError` that names `what` it was given."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise InputError(f"{type(processor).__name__} does not take {what}: {error or type(error).__name__}") from error
