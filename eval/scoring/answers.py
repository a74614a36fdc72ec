"""Scores of single answers, each after its benchmark's own rules."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


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


def relaxed(prediction: str, target: str, tolerance: float = 0.05) -> float:
    """ChartQA: numbers within 5 % of the target, other answers the same but for case.

    A target of 0 has no 5 %, and is compared as a word: "0" is right and "0.0" is not.
    """
    said, wanted = _number(prediction), _number(target)
    if said is not None and wanted:
        return float(abs(said - wanted) / abs(wanted) <= tolerance)
    return float(prediction.lower() == target.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def contained(prediction: str, answers: Sequence[str], *, formula: bool = False) -> float:
    """OCRBench: 1 if an answer occurs in what was said, case apart; formulas are compared without spaces, with case."""
    said = _folded(prediction, formula)
    return float(any(_folded(answer, formula) in said for answer in answers))


def _folded(text: str, formula: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if formula else "".join(map(_narrow, text.lower()))


def _narrow(letter: str) -> str:
    """Full-width Latin letters, digits, marks and spaces as the usual ones."""
    return unicodedata.normalize("NFKC", letter) if "\uff01" <= letter <= "\uff5e" or letter == "\u3000" else letter


def all_of_some(prediction: str, target: str) -> float:
    """Share of the parts joined by <AND> that occur in the answer, of the best alternative joined by <OR>; case apart.

    MM-Vet writes its answers so, and has a language model grade them; this is what can be said without one.
    """
    said = " ".join(prediction.lower().split())
    best = 0.0
    for alternative in target.split("<OR>"):
        parts = [" ".join(part.lower().split()) for part in alternative.split("<AND>")]
        best = max(best, sum(part in said for part in parts) / len(parts))
    return best


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer is one of these, case and a full stop at the end apart."""
    said = prediction.strip().rstrip(".").lower()
    return float(any(said == answer.strip().rstrip(".").lower() for answer in answers))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Best normalised Levenshtein similarity to an answer, 0 where it is below the threshold (DocVQA, InfoVQA).

    Distances ignore case and runs of spaces; the lengths that they are divided by do not.
    """
    said = " ".join(prediction.strip().lower().split())
    least = 1.0
    for answer in answers:
        wanted = " ".join(answer.strip().lower().split())
        longest = max(len(answer.upper()), len(prediction.upper()))
        least = min(least, levenshtein(said, wanted) / longest if longest else 0.0)
    return 1 - least if 1 - least >= threshold else 0.0


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
