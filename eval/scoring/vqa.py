"""Consensus with ten annotators: the rule of VQAv2's official script, and the variant of TextVQA and VizWiz."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_DIGITS.split(" "))}
_NUMBERS["none"] = "0"
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MAX_FULL_STOPS = 32  # the official script passes a flag (re.UNICODE, 32) where `re.sub` takes a count
# In the correct spelling; annotators leave an apostrophe out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspelt() -> dict[str, str]:
    """Map each spelling with one apostrophe left out to the correct one."""
    found = {"somebody'd": "somebodyd"}  # reversed in the official table
    for right in _CONTRACTIONS.split():
        for match in re.finditer("'", right):
            found[right[: match.start()] + right[match.end() :]] = right
    return found


MISSPELT = _misspelt()


def normalise(text: str) -> str:
    """Normalise an answer as VQAv2 does: lower case, no articles, digits for number words, no punctuation.

    A punctuation mark beside a space is deleted, as are all marks if a number has a thousands separator; other marks
    become a space. A full stop is deleted unless a digit follows.
    """
    separated = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = f"{mark} " in text or f" {mark}" in text or separated
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=_MAX_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(MISSPELT.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score as VQAv2 does: min(1, matches / 3), averaged over the subsets that leave one annotator out.

    If all annotators gave the same string, nothing is normalised, so "Yes" does not match "yes".
    """
    said, known = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(known)) > 1:
        said, known = normalise(said), [normalise(answer) for answer in known]
    return _consensus(said, known)


def accuracy_of_words(prediction: str, answers: Sequence[str]) -> float:
    """Score as the servers of TextVQA and VizWiz do: always normalised, after deleting commas and question marks."""
    return _consensus(_words(prediction), [_words(answer) for answer in answers])


def _words(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(_one_line(text))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _consensus(said: str, known: Sequence[str]) -> float:
    matches = sum(answer == said for answer in known)
    return sum(min(1.0, (matches - (answer == said)) / 3) for answer in known) / len(known)
