"""Scorers against cases worked out by hand, and against published figures of published answers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.scoring.answers import (
    anls,
    binary,
    levenshtein,
    normalise_vqa,
    option_letter,
    relaxed,
    vqa_accuracy,
    yes_no,
    yes_no_or_other,
)

GOLDEN = Path(os.environ.get("VTC_GOLDEN_SCORING", Path(__file__).parents[3] / "shared" / "golden" / "scoring"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Dog", "dog"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("e-mail", "e mail"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("dont know", "don't know"),
        ("couldntve", "couldn't've"),
        ("a\nb\tthe", "b"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_person_out(matches: int, accuracy: float) -> None:
    # With one match, nine of the ten subsets still hold it: 0.9 / 3. With three: (3 * 2/3 + 7 * 1) / 10.
    answers = ["cat"] * matches + [f"dog {n}" for n in range(10 - matches)]
    assert vqa_accuracy("The cat.", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes, there is.", "yes"), ("No", "no"), ("There is not a dog. Yes", "no"), ("A dog", "yes"), ("no, sir", "no")],
)
def test_pope_reads_the_first_sentence(text: str, expected: str) -> None:
    assert yes_no(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("Yes", "yes"), ("no.", "no"), ("Not sure", "no"), ("Maybe yes", "other"), ("", "other")]
)
def test_mme_reads_four_letters(text: str, expected: str) -> None:
    assert yes_no_or_other(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" B. ", "B"),
        ("(C) because", "C"),
        ("B: the cat", "B"),
        ("The answer is D.", "D"),
        ("The answer is A. No, the answer is B.", None),
        ("E", None),
        ("Because of B", None),
        ("A cat", None),
        ("", None),
    ],
)
def test_option_letters(text: str, expected: str | None) -> None:
    assert option_letter(text, "ABCD") == expected


@pytest.mark.parametrize(
    ("prediction", "target", "score"),
    [
        ("105", "100", 1.0),
        ("94.9", "100", 0.0),
        ("0.05", "5%", 1.0),
        ("0", "0", 1.0),
        ("0.01", "0", 0.0),
        ("Blue", "blue", 1.0),
        ("blue", "100", 0.0),
        ("-9.6", "-10", 1.0),
    ],
)
def test_relaxed_accuracy(prediction: str, target: str, score: float) -> None:
    assert relaxed(prediction, target) == score


def test_anls_by_hand() -> None:
    assert anls("Hello  World", ["hello world"]) == 1.0
    assert anls("hallo", ["hello", "xyz"]) == pytest.approx(0.8)
    assert anls("ab", ["abcd"]) == 0.5
    assert anls("ab", ["abcde"]) == 0.0  # 0.4 lies below the threshold
    assert anls("", [""]) == 1.0


words = st.text(alphabet="abc", max_size=8)


@given(words, words, words)
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert levenshtein(a, a) == 0
    assert levenshtein(a, b) == levenshtein(b, a)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@given(st.text())
def test_normalising_twice_is_normalising_once_for_letters(text: str) -> None:
    letters = " ".join(word for word in text.split() if word.isalpha() and word.isascii())
    assert normalise_vqa(normalise_vqa(letters)) == normalise_vqa(letters)


def test_binary_figures_by_hand() -> None:
    figures = binary(["yes", "yes", "no", "yes"], ["yes", "no", "no", "yes"])
    assert figures == pytest.approx({"accuracy": 0.75, "precision": 2 / 3, "recall": 1.0, "f1": 0.8, "yes_ratio": 0.75})
    assert binary(["no"], ["yes"])["f1"] == 0.0


@pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="published answers are not here (VTC_GOLDEN_SCORING names their folder)"
)
class TestPublishedFigures:
    """LLaVA-1.5-13B's own answers, scored here, give the figures of its model zoo."""

    def test_pope(self) -> None:
        folder = GOLDEN / "pope"
        answers = {r["question_id"]: r["text"] for r in _lines(folder / "llava-v1.5-13b_answers.jsonl")}
        asked = _lines(folder / "llava_pope_test.jsonl")
        figures = {}
        for split in ("random", "popular", "adversarial"):
            labels = {(r["image"], _thing(r["text"])): r["label"] for r in _lines(folder / f"coco_pope_{split}.json")}
            mine = [r for r in asked if r["category"] == split]
            truth = [labels[r["image"], _thing(r["text"])] for r in mine]
            figures[split] = binary([yes_no(answers[r["question_id"]]) for r in mine], truth)
        rounded = {split: (round(100 * f["accuracy"], 2), round(100 * f["f1"], 2)) for split, f in figures.items()}
        assert rounded == {"random": (88.01, 87.14), "popular": (87.43, 86.25), "adversarial": (85.5, 84.46)}
        assert 100 * np.mean([f["f1"] for f in figures.values()]) == pytest.approx(85.95, abs=0.005)

    def test_scienceqa(self) -> None:
        folder = GOLDEN / "scienceqa"
        outputs = json.loads((folder / "llava-v1.5-13b_result.json").read_text())["outputs"]
        hits = {}
        for record in json.loads((folder / "llava_test_CQM-A.json").read_text()):
            said = option_letter(outputs[record["id"]], "ABCDE")
            hits[record["id"]] = (said == record["conversations"][1]["value"], "image" in record)
        assert len(hits) == 4241
        assert round(100 * np.mean([hit for hit, _ in hits.values()]), 2) == 74.39
        images = [hit for hit, image in hits.values() if image]
        assert len(images) == 2017
        assert round(100 * np.mean(images), 2) == 71.64


def _thing(question: str) -> str:
    """What a question asks for; its wording was corrected between the two releases."""
    return re.match(r"Is there an? (.+?) in the", question)[1]


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
