"""Scorers against cases worked out by hand, and against published figures of published answers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.scoring import vqa
from eval.scoring.answers import anls, binary_figures, chosen_option, exact, levenshtein, relaxed, yes_or_no
from eval.tasks import get_task

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
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("Im lets ive", "im lets ive"),
        ("a\nb\tthe", "b"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text: str, expected: str) -> None:
    assert vqa.normalise(text) == expected


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
@pytest.mark.parametrize("score", [vqa.accuracy, vqa.accuracy_of_words])
def test_vqa_accuracy_leaves_each_person_out(score: Any, matches: int, accuracy: float) -> None:
    # With one match, nine of the ten subsets still hold it: 0.9 / 3. With three: (3 * 2/3 + 7 * 1) / 10.
    answers = ["cat"] * matches + [f"dog {n}" for n in range(10 - matches)]
    assert score("The cat.", answers) == pytest.approx(accuracy)


def test_vqav2_normalises_nothing_where_all_people_agree() -> None:
    assert vqa.accuracy("Yes.", ["yes"] * 10) == 0.0
    assert vqa.accuracy(" yes\n", ["yes"] * 10) == 1.0
    assert vqa.accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1.0
    assert vqa.accuracy("2", ["two "] * 5 + [" two"] * 5) == 0.0, "spaces do not make answers differ"
    assert vqa.accuracy_of_words("Yes.", ["yes"] * 10) == 1.0


def test_textvqa_drops_commas_and_parts_possessives_first() -> None:
    assert vqa.accuracy_of_words("coca,cola", ["cocacola"] * 10) == 1.0
    assert vqa.accuracy("coca,cola", ["cocacola"] * 9 + ["x"]) == 0.0
    assert vqa.accuracy_of_words("mcdonald's", ["mcdonald 's"] * 10) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes, there is.", "yes"), ("No", "no"), ("There is not a dog. Yes", "no"), ("A dog", "yes"), ("no, sir", "no")],
)
def test_pope_reads_the_first_sentence(text: str, expected: str) -> None:
    assert yes_or_no(text) == expected


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
    assert chosen_option(text, "ABCD") == expected


@pytest.mark.parametrize(
    ("prediction", "target", "score"),
    [
        ("105", "100", 1.0),
        ("94.9", "100", 0.0),
        ("0.05", "5%", 1.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),
        ("0.01", "0", 0.0),
        ("50%", "0.5", 1.0),
        ("-105", "100", 0.0),
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
    assert anls("ab  cd", ["ab cd"]) == 1.0
    # Distance 2 over length 6, spaces counted as they were written.
    assert anls("ab    ", ["abcd"]) == pytest.approx(1 - 2 / 6)


def test_exact_answers() -> None:
    assert exact(" Cat. ", ["dog", "cat"]) == 1.0
    assert exact("cats", ["cat"]) == 0.0


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
    assert vqa.normalise(vqa.normalise(letters)) == vqa.normalise(letters)


def test_binary_figures_by_hand() -> None:
    figures = binary_figures(["yes", "yes", "no", "yes"], ["yes", "no", "no", "yes"])
    assert figures == pytest.approx({"accuracy": 0.75, "precision": 2 / 3, "recall": 1.0, "f1": 0.8, "yes_ratio": 0.75})
    assert binary_figures(["no"], ["yes"])["f1"] == 0.0


# ------------------------------------------------------------------------------------------ against other people's code


ANSWERS = st.lists(
    st.text(alphabet="aAtThe nox'.,;?!()-1203%s\n", max_size=12)
    | st.sampled_from(
        ["yes", "Yes", "The two.", "1,000", "3.5", "dont", "somebody'd", "none", "it's", "y'allll", "e-mail"]
    ),
    min_size=2,
    max_size=10,
)


def lmms_eval(file: str) -> Any:
    """One file of lmms-eval, alone: the package as a whole imports half of the world."""
    try:
        path = metadata.distribution("lmms-eval").locate_file(f"lmms_eval/tasks/{file}")
    except metadata.PackageNotFoundError:
        pytest.skip("lmms-eval is not installed")
    spec = importlib.util.spec_from_file_location("theirs", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_vqa_answers_are_normalised_as_lmms_eval_does() -> None:
    theirs = lmms_eval("_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor
    assert {
        wrong: right for wrong, right in theirs.CONTRACTIONS.items() if wrong == wrong.lower() and wrong != right
    } == vqa.MISSPELT

    @given(ANSWERS)
    def compare(texts: list[str]) -> None:
        for text in texts:
            line = text.replace("\n", " ").strip()
            if ",," in line:  # a thousands separator to theirs, none to the official script
                continue
            expected = theirs().process_digit_article(theirs().process_punctuation(line))
            assert vqa.normalise(line) == expected
        said, known = texts[0], [theirs()(text) for text in texts]
        matching = [sum(known[j] == known[0] for j in range(len(known)) if j != i) for i in range(len(known))]
        assert vqa.accuracy_of_words(said, texts) == pytest.approx(np.mean([min(1, n / 3) for n in matching]))

    compare()


def test_numbers_in_charts_are_compared_as_lmms_eval_does() -> None:
    theirs = lmms_eval("chartqa/utils.py").relaxed_correctness
    numbers = st.decimals(-200, 200, places=1).map(str) | st.integers(-20, 20).map(str) | st.just("blue")

    @given(numbers, numbers, st.sampled_from(["", "%"]), st.sampled_from(["", "%"]))
    def compare(said: str, wanted: str, said_sign: str, wanted_sign: str) -> None:
        pair = said + said_sign, wanted + wanted_sign
        assert relaxed(*pair) == float(theirs(*pair))

    compare()


def test_anls_is_that_of_the_package() -> None:
    theirs = pytest.importorskip("anls", reason="pip install anls").anls_score
    texts = st.text(alphabet="abcAB ", min_size=1, max_size=8).map(lambda text: " ".join(text.split()) or "a")

    @given(texts, st.lists(texts, min_size=1, max_size=3))
    def compare(said: str, wanted: list[str]) -> None:
        if anls(said, wanted) != 0.5:  # the official script counts the threshold itself, the package does not
            assert anls(said, wanted) == pytest.approx(theirs(said, wanted))

    compare()


# --------------------------------------------------------------------------------------------------- published figures


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
            figures[split] = binary_figures([yes_or_no(answers[r["question_id"]]) for r in mine], truth)
        rounded = {split: (round(100 * f["accuracy"], 2), round(100 * f["f1"], 2)) for split, f in figures.items()}
        assert rounded == {"random": (88.01, 87.14), "popular": (87.43, 86.25), "adversarial": (85.5, 84.46)}
        assert 100 * np.mean([f["f1"] for f in figures.values()]) == pytest.approx(85.95, abs=0.005)
        # The task's own figures, over the questions that both releases have.
        task = get_task("pope")
        said = {(r["category"], r["image"], _thing(r["text"])): answers[r["question_id"]] for r in asked}
        rows = []
        for sample in task.samples(folder):
            key = sample.meta["kind"], sample.group, _thing(sample.question)
            if key in said:
                rows.append({"kind": key[0], "scores": task.score(sample, said[key])})
        assert len(rows) == 8910
        summary = task.summarise(rows)
        assert round(100 * summary["mean_f1"], 2) == 85.95
        assert round(100 * summary["random.accuracy"], 2) == 88.01

    def test_scienceqa(self) -> None:
        folder = GOLDEN / "scienceqa"
        outputs = json.loads((folder / "llava-v1.5-13b_result.json").read_text())["outputs"]
        hits = {}
        for record in json.loads((folder / "llava_test_CQM-A.json").read_text()):
            said = chosen_option(outputs[record["id"]], "ABCDE")
            hits[record["id"]] = (said == record["conversations"][1]["value"], "image" in record)
        assert len(hits) == 4241
        assert round(100 * np.mean([hit for hit, _ in hits.values()]), 2) == 74.39
        images = [hit for hit, image in hits.values() if image]
        assert len(images) == 2017
        assert round(100 * np.mean(images), 2) == 71.64
        # And the task from end to end: the published file in, the published figure out.
        task = get_task("scienceqa-img")
        scores = [task.score(sample, outputs[sample.id]) for sample in task.samples(folder)]
        assert round(100 * task.summarise([{"scores": each} for each in scores])["score"], 2) == 71.64


def _thing(question: str) -> str:
    """What a question asks for; its wording was corrected between the two releases."""
    return re.match(r"Is there an? (.+?) in the", question)[1]


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
