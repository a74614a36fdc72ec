"""Divergence along a forced text: nothing with all tokens, what a step-by-step computation says with fewer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vtc
import vtc.reference
from eval import __main__ as cli
from eval import continuations, models, results_log
from eval.models import Loaded
from eval.tasks import get_task
from eval.tasks.descriptions import named

pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    if not vtc.reference.available():
        pytest.skip("the reference models are not installed")
    return models.load("reference:llava")


def test_what_is_forced_is_what_the_model_reads(loaded: Loaded) -> None:
    """The probabilities along a text, ends of answers among it, are those of one pass over prompt and text."""
    turns = get_task("scenes", pictures=1, per_picture=3).samples(None)
    prompt = models.inputs(loaded, turns[:1], [turns[0].open()])
    text, _ = continuations._forced_text(loaded, turns, 64)
    assert loaded.processor.tokenizer.eos_token_id in text[:-1]
    tokens = torch.tensor([text])
    with torch.no_grad():
        expected = loaded.model(
            **{**prompt, "input_ids": torch.cat([prompt["input_ids"], tokens], dim=1), "attention_mask": None}
        ).logits[:, -len(text) - 1 : -1]
    found = continuations.forced(loaded, prompt, tokens)
    torch.testing.assert_close(found, expected.log_softmax(dim=-1), rtol=1e-4, atol=1e-4)


def test_answers_are_compared_and_questions_are_not(loaded: Loaded) -> None:
    turns = get_task("scenes", pictures=1, per_picture=3).samples(None)
    tokens, compared = continuations._forced_text(loaded, turns, 64)
    words = [word.removeprefix("Ġ") for word in loaded.processor.tokenizer.convert_ids_to_tokens(tokens)]
    answers, questions = (
        "".join(word for word, chosen in zip(words, compared, strict=True) if chosen is wanted)
        for wanted in (True, False)
    )
    ends = loaded.processor.tokenizer.eos_token
    first = turns[0].target
    assert answers == ends + "".join(turn.target.replace(" ", "") + ends for turn in turns[1:]), "but the first token"
    assert questions == first + "".join(turn.question.replace(" ", "") + "<|im_end|>" for turn in turns[1:])
    assert continuations._forced_text(loaded, turns, 7) == (tokens[:7], compared[:7])


def test_the_models_own_text_is_forced_upon_it(loaded: Loaded) -> None:
    (sample,) = get_task("scene-descriptions", pictures=1).samples(None)
    prompt = models.inputs(loaded, [sample], [sample.open()])
    tokens, before = continuations.continued(loaded, prompt, 10)
    assert tokens.shape == (1, 10)
    assert loaded.model.generation_config.eos_token_id not in tokens
    torch.testing.assert_close(continuations.forced(loaded, prompt, tokens), before, rtol=1e-5, atol=1e-5)


def test_a_command_measures_and_continues(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: loaded)
    command = ["continuations", "--pictures", "3", "--batch-size", "2", "--tokens", "24", "--keep", "0.2", "0.9"]
    command += ["--per-picture", "3", "--out", str(tmp_path), "--methods"]
    assert cli.main([*command, "prefixkv", "random@cache"]) == 0
    first = results_log.read(tmp_path)[1]
    assert len(first) == 3 * 2 * 2
    assert cli.main([*command, "prefixkv", "random@cache", "h2o(recent=4)@cache", "--profile", "2"]) == 0
    rows = results_log.read(tmp_path)[1]
    assert [row for row in rows if row in first] == [row for row in rows if row["method"] in ("prefixkv", "random")]
    assert {row["method"] for row in rows} == {"prefixkv", "random", "h2o(recent=4)", "prefixkv, profile of 2"}
    assert all(2 <= row["tokens"] < 24 and row["kl"] > 0 and 0 <= row["equal"] <= 1 for row in rows)
    stored = {(row["method"], row["keep"]): row["stored"] for row in rows}
    assert stored["prefixkv", 0.2] == pytest.approx(0.2, abs=0.01), "of the whole prompt, its text included"
    assert stored["prefixkv, profile of 2", 0.9] == pytest.approx(0.9, abs=0.02)
    assert stored["random", 0.2] > 0.21, "the text stays"
    frame, text = continuations.tables(tmp_path)
    loss = frame.set_index(["method", "keep"])["kl"]
    assert loss["prefixkv", 0.2] > loss["prefixkv", 0.9]
    assert "| prefixkv, profile of 2 - prefixkv |" in text
    assert text == (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert cli.main([*command, "prefixkv", "--profile", "1"]) == 0
    others = {row["method"] for row in results_log.read(tmp_path)[1]} - {row["method"] for row in rows}
    assert others == {"prefixkv, profile of 1"}, "rows of another number of pictures are not taken for these"
    log = tmp_path / "rows.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert set(continuations.tables(tmp_path)[0]["texts"]) == {2}, "the same texts for all"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--keep", "1.5"], "between 0 and 1"),
        (["--methods", "nope"], "nope"),
        (["--methods", "h2o(recents=4)"], "recents"),
        (["--tokens", "1"], "--tokens must be at least 2"),
        (["--text", "own", "--task", "scenes"], "--text own is for scene-descriptions"),
        (["--per-picture", "1"], "at least 2 questions"),
        (["--profile", "3", "--draw", "exploring:999"], "exploring:999"),
    ],
)
def test_mistakes_are_named(arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["continuations", *arguments]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.parametrize("text", ["own", "reference"])
def test_descriptions_are_forced_too(loaded: Loaded, tmp_path: Path, text: str) -> None:
    plan = continuations.Plan(
        task="scene-descriptions",
        model="reference:llava",
        draw="exploring:0",
        text=text,
        scope="visual",
        pictures=2,
        per_picture=1,
        tokens=9,
        profile=0,
        batch_size=2,
        seed=0,
        methods=("uniform@cache", "h2o"),
        keep=(0.25,),
    )
    continuations.measure(plan, loaded, tmp_path, progress=False)
    rows = results_log.read(tmp_path)[1]
    assert [row["tokens"] for row in rows] == [8] * 4, "the first is the same in all"
    assert len({round(row["stored"], 6) for row in rows}) == 1


def test_descriptions_name_every_object_once() -> None:
    from eval.tasks.generated import _clip, scene_at

    for sample in get_task("scene-descriptions", pictures=20).samples(None):
        scene = scene_at(0, sample.meta["index"])
        things = {f"{thing.colour} {thing.name}" for thing in scene.objects}
        assert named(sample.target) == things | {f"{sign.colour} sign that says {sign.text}" for sign in scene.signs}
        assert sample.target.count(",") == len(scene.named) - 1
    for sample in get_task("clip-descriptions", pictures=10).samples(None):
        assert named(sample.target) == {f"{a.colour} {a.name}" for a in _clip(0, sample.meta["index"]).objects}


def test_a_description_is_scored_by_what_it_names() -> None:
    task = get_task("scene-descriptions", pictures=1)
    (sample,) = task.samples(None)
    assert task.score(sample, sample.target) == {"named": 1.0, "exact": 1.0}
    assert task.score(sample, "") == {"named": 0.0, "exact": 0.0}
    first = sample.target.split(",")[0]
    assert 0 < task.score(sample, first)["named"] < 1
