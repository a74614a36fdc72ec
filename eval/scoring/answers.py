"""Scores of single answers, each after its benchmark's own rules."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_DIGITS.split(" "))}
_NUMBERS["none"] = "0"
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Spelt right; people leave the apostrophes out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all you'd you'd've you'll you're you've
"""


def _misspelt() -> dict[str, str]:
    """Every way of leaving out apostrophes to the right spelling."""
    found = {}
    for right in _CONTRACTIONS.split():
        places = [match.start() for match in re.finditer("'", right)]
        for chosen in range(1, 2 ** len(places)):
            drop = {place for bit, place in enumerate(places) if chosen >> bit & 1}
            found["".join(letter for place, letter in enumerate(right) if place not in drop)] = right
    return found


_MISSPELT = _misspelt()


def normalise_vqa(text: str) -> str:
    """An answer as VQAv2's evaluation compares it: lower case, no articles, digits, no punctuation but inside numbers.

    A punctuation mark next to a space goes without a trace, so do all if a number has a thousands separator; others
    become a space. Full stops go unless a digit follows.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    separated = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = f"{mark} " in text or f" {mark}" in text or separated
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_MISSPELT.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with ten people: min(1, matches / 3), averaged over leaving each of them out."""
    said, known = normalise_vqa(prediction), [normalise_vqa(answer) for answer in answers]
    matches = sum(answer == said for answer in known)
    return sum(min(1.0, (matches - (answer == said)) / 3) for answer in known) / len(known)


def yes_no(prediction: str) -> str:
    """POPE's reading: "no" if the first sentence has a "no" or a "not", else "yes"."""
    words = prediction.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def yes_no_or_other(prediction: str) -> str:
    """MME's reading: the answer itself, or a yes or no among its first four letters."""
    said = prediction.strip().lower()
    if said in ("yes", "no"):
        return said
    return "yes" if "yes" in said[:4] else "no" if "no" in said[:4] else "other"


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


def relaxed(prediction: str, target: str, tolerance: float = 0.05) -> float:
    """ChartQA: numbers within 5 % of the target, other answers the same but for case."""
    try:
        said, wanted = _number(prediction), _number(target)
    except ValueError:
        return float(prediction.strip().lower() == target.strip().lower())
    if wanted == 0:
        return float(said == 0)
    return float(abs(said - wanted) / abs(wanted) <= tolerance)


def _number(text: str) -> float:
    text = text.strip()
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Best normalised Levenshtein similarity to an answer, 0 where it is below the threshold (DocVQA, InfoVQA)."""
    said = " ".join(prediction.strip().lower().split())
    best = 0.0
    for answer in answers:
        wanted = " ".join(answer.strip().lower().split())
        longest = max(len(said), len(wanted))
        best = max(best, 1 - levenshtein(said, wanted) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements that make `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def binary(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and how often it was said."""
    pairs = list(zip(predictions, labels, strict=True))
    right = sum(p == t for p, t in pairs)
    true = sum(p == t == "yes" for p, t in pairs)
    said, wanted = sum(p == "yes" for p, _ in pairs), sum(t == "yes" for _, t in pairs)
    precision, recall = true / said if said else 0.0, true / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if true else 0.0
    share = said / len(pairs)
    return {"accuracy": right / len(pairs), "precision": precision, "recall": recall, "f1": f1, "yes_ratio": share}
