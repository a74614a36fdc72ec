"""Which option an answer chooses, each rule after the benchmark that uses it.

Where an official script draws an option at random for an answer that names none, these say None, which is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def option_letter(prediction: str, letters: Sequence[str]) -> str | None:
    """The option that an answer names: "B", "B.", "(B)", "B. because", "The answer is B."; None if it names none."""
    said = prediction.strip()
    if said in set(letters):
        return said
    start = re.match(r"\(?([A-Z])(?:[).:,]|\s*$)", said)
    if start and start[1] in letters:
        return start[1]
    named = re.findall(r"[Tt]he answer is \(?([A-Z])\b", said)
    return named[0] if len(set(named)) == 1 and named[0] in letters else None


def letter_or_text(prediction: str, options: Mapping[str, str]) -> str | None:
    """MMBench without a language model as judge: the one letter among the last words, or the one option whose text is.

    Parameters
    ----------
    prediction : str
    options : mapping of letter to text
    """
    if any(refusal in prediction for refusal in _REFUSALS):
        return None
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1:
        # A letter at the start of a long sentence may be a word ("A cat ..."); only the last words count.
        return named[0] if words.index(named[0]) > len(words) - 5 else _by_text(prediction, options)
    if not named and "Z" in words:
        return None
    return _by_text(prediction, options)


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def _by_text(prediction: str, options: Mapping[str, str]) -> str | None:
    said = prediction.lower()
    if len(said) > 2 * sum(len(text) for text in options.values()):
        return None
    named = [letter for letter, text in options.items() if text.lower() in said]
    return named[0] if len(named) == 1 else None


def first_character(prediction: str, letters: Sequence[str]) -> str | None:
    """SEED-Bench: the first character, capital or not."""
    first = prediction.strip()[:1].upper()
    return first if first and first in letters else None


def leading_letter(prediction: str, letters: Sequence[str]) -> str | None:
    """MMStar: the letter that comes first, or right after "(", "option " or "the answer is "."""
    said = prediction.lower().strip().replace("\n", " ")
    for lead in ("", "(", "option ", "the answer is "):
        letter = said[len(lead) : len(lead) + 1].upper()
        if said.startswith(lead) and letter and letter in letters:
            return letter
    return None


def first_capital(prediction: str, letters: Sequence[str]) -> str | None:
    """Video-MME and LongVideoBench: after such words as "The answer is", the first capital that is an option's."""
    said = prediction.strip()
    for lead in _LEADS:
        said = said.replace(lead, "")
    found = re.search(f"[{''.join(letters)}]", said)
    return found[0] if found else None


_LEADS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def lone_capital(prediction: str, letters: Sequence[str]) -> str | None:
    """PerceptionTest: the first capital of an option that is a word of its own."""
    found = re.search(rf"\b([{''.join(letters)}])\b", prediction.strip())
    return found[1] if found else None


def first_word(prediction: str, letters: Sequence[str]) -> str | None:
    """MVBench and MLVU: the first word is the option, in brackets ("(B)"), half in brackets ("B)") or bare ("b.")."""
    first = prediction.lower().strip().split(" ")[0]
    bare = first.replace(".", "")
    for letter in letters:
        small = letter.lower()
        if (small in bare and bare in f"({small})") or f"({small})" in first:
            return letter
    return None
