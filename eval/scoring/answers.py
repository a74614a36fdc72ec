"""Scores of single answers: yes or no, multiple choice, numbers, exact and approximate text."""

from __future__ import annotations

import re
from collections.abc import Sequence


def yes_or_no(prediction: str) -> str:
    """Parse an answer as POPE does: "no" if its first sentence contains "no" or "not", otherwise "yes"."""
    words = prediction.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def binary_figures(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Compute accuracy, the precision, recall and F1 of "yes", and the share of predictions that are "yes"."""
    pairs = list(zip(predictions, labels, strict=True))
    right = sum(p == t for p, t in pairs)
    true = sum(p == t == "yes" for p, t in pairs)
    said, wanted = sum(p == "yes" for p, _ in pairs), sum(t == "yes" for _, t in pairs)
    precision, recall = true / said if said else 0.0, true / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if true else 0.0
    share = said / len(pairs)
    return {"accuracy": right / len(pairs), "precision": precision, "recall": recall, "f1": f1, "yes_ratio": share}


def chosen_option(prediction: str, letters: Sequence[str]) -> str | None:
    """Parse a multiple-choice answer: "B", "B.", "(B)", "B. because", "The answer is B."; None if it names no option.

    Some official scripts draw an option at random where an answer names none; here such an answer is wrong.
    """
    text = prediction.strip()
    if text in set(letters):
        return text
    start = re.match(r"\(?([A-Z])(?:[).:,]|\s*$)", text)
    if start and start[1] in letters:
        return start[1]
    named = re.findall(r"[Tt]he answer is \(?([A-Z])\b", text)
    return named[0] if len(set(named)) == 1 and named[0] in letters else None


def relaxed(prediction: str, target: str, tolerance: float = 0.05) -> float:
    """Score as ChartQA does: numbers may deviate by 5 % from the target, other answers only in case.

    A relative tolerance is not defined for a target of 0, which is compared as text: "0" is right and "0.0" is not.
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


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Score 1 if the prediction equals one of the answers; case and a final full stop are ignored."""
    said = prediction.strip().rstrip(".").lower()
    return float(any(said == answer.strip().rstrip(".").lower() for answer in answers))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Score the best normalised Levenshtein similarity to an answer, 0 below the threshold (DocVQA, InfographicVQA).

    As in the official script, distances ignore case and runs of spaces, but the lengths that normalise them do not.
    """
    said = " ".join(prediction.strip().lower().split())
    least = 1.0
    for answer in answers:
        wanted = " ".join(answer.strip().lower().split())
        longest = max(len(answer.upper()), len(prediction.upper()))
        least = min(least, levenshtein(said, wanted) / longest if longest else 0.0)
    return 1 - least if 1 - least >= threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """Count the fewest insertions, deletions and replacements that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
