"""`vtc.train`: modules learn, the model does not, and an interrupted run goes on to the same result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.nn import functional

import vtc
from tests import tiny
from vtc.errors import ConfigError, InputError
from vtc.selectors.learned import read_modules
from vtc.tuning import train as training

QUICK = {"steps": 6, "batch": 2, "rate": 3e-3, "save_every": 2, "progress": False}


@pytest.fixture
def case() -> tiny.TinyCase:
    return tiny.build("llava")


def samples(case: tiny.TinyCase) -> list[dict[str, Any]]:
    return [*case.rows("single"), *case.rows("ragged"), *case.rows("two_images")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "modules.safetensors")


def divergence(model: Any, prompts: list[dict[str, Any]], folder: Path) -> float:
    """How far the next word is from what the untouched model says, on average."""
    total = 0.0
    with torch.no_grad():
        for prompt in prompts:
            meant = model(**prompt).logits[0, -1].log_softmax(-1)
            with vtc.compressed(model, "llava-mini", modules=str(folder), keep_tokens=64):
                said = model(**prompt).logits[0, -1].log_softmax(-1)
            total += float(functional.kl_div(said, meant, log_target=True, reduction="sum"))
    return total / len(prompts)


def test_modules_learn_to_imitate_and_the_model_stays(case: tiny.TinyCase, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    wanted = [weight.requires_grad for weight in case.model.parameters()]
    prompts = samples(case)
    first = vtc.train(case.model, None, prompts, "llava-mini", tmp_path / "first", **{**QUICK, "rate": 1e-12})
    long = vtc.train(case.model, None, prompts, "llava-mini", tmp_path / "long", **{**QUICK, "steps": 40})
    assert divergence(case.model, prompts, long) < 0.8 * divergence(case.model, prompts, first)
    assert not vtc.is_compressed(case.model)
    assert [weight.requires_grad for weight in case.model.parameters()] == wanted
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    assert sorted(path.name for path in long.iterdir()) == ["modules.json", "modules.safetensors"]
    told = read_modules(long, "llava-mini")[0].training
    assert told["steps"] == 40
    assert told["labelled"] == 0


def test_modules_learn_answers(case: tiny.TinyCase, tmp_path: Path) -> None:
    processor = SimpleNamespace(tokenizer=lambda text, **given: SimpleNamespace(input_ids=[len(text)]))
    prompts = case.rows("ragged")
    folder = vtc.train(
        case.model,
        processor,
        prompts,
        "llava-mini",
        tmp_path / "made",
        answers=["a" * 7, "a" * 9],
        **{**QUICK, "steps": 40, "rate": 1e-2},
    )
    with vtc.compressed(case.model, "llava-mini", modules=str(folder), keep_tokens=64):
        said = [int(case.model(**prompt).logits[0, -1].argmax()) for prompt in prompts]
    assert said == [7, 9]


def test_an_interrupted_run_goes_on_to_the_same_weights(
    case: tiny.TinyCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = samples(case)
    whole = vtc.train(case.model, None, prompts, "llava-mini", tmp_path / "whole", **QUICK)
    original, calls = training._loss, iter(range(100))

    def interrupted(*args: Any, **given: Any) -> torch.Tensor:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(*args, **given)

    monkeypatch.setattr(training, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vtc.train(case.model, None, prompts, "llava-mini", tmp_path / "parts", **QUICK)
    assert not vtc.is_compressed(case.model)
    with pytest.raises(ConfigError, match="another model or other settings"):
        vtc.train(case.model, None, prompts, "llava-mini", tmp_path / "parts", **{**QUICK, "seed": 1})
    parts = vtc.train(case.model, None, prompts, "llava-mini", tmp_path / "parts", **QUICK)
    assert next(calls) == 8 + 6, "three of six steps were done"
    assert weights(whole).keys() == weights(parts).keys()
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())
    other = vtc.train(case.model, None, prompts, "llava-mini", tmp_path / "other", **{**QUICK, "seed": 1})
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(whole).items())


def test_every_epoch_shows_each_sample_once() -> None:
    run = training.TrainingRun(steps=10, batch=3, rate=1.0, seed=0)
    seen = [index for step in range(10) for index in run.samples_of(step, 5)]
    assert len(seen) == 30
    epochs = [seen[first : first + 5] for first in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_impossible_requests_are_refused(case: tiny.TinyCase, tmp_path: Path) -> None:
    prompts = case.rows("single")

    def refused(kind: type[Exception], match: str, *, method: str = "llava-mini", **given: Any) -> None:
        with pytest.raises(kind, match=match):
            vtc.train(case.model, None, prompts, method, tmp_path / "made", **{**QUICK, **given})
        assert not (tmp_path / "made").exists()

    refused(ConfigError, "'divprune' has no modules to train", method="divprune")
    refused(ConfigError, "steps", steps=0)
    refused(ConfigError, "rate must be a number above 0", rate=0)
    refused(ConfigError, "do not take", colour="red")
    refused(ConfigError, "side must be an integer", side=0)
    refused(InputError, "1 samples, but 2 answers", answers=["yes", "no"])
    refused(InputError, "an answer is a text", answers=["yes"])
    folder = vtc.train(case.model, None, prompts, "llava-mini", tmp_path / "done", **{**QUICK, "steps": 1})
    with pytest.raises(ConfigError, match="holds trained modules already"):
        vtc.train(case.model, None, prompts, "llava-mini", folder, **QUICK)


@pytest.mark.parametrize(("method", "lora"), [("crosslmm", 2), ("crosslmm", None), ("vision-remember", None)])
def test_modules_inside_the_decoder_learn(
    case: tiny.TinyCase, method: str, lora: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They imitate better than pooling does, the model stays as it was, and an interrupted run goes on."""
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    prompts = samples(case)
    given = {**QUICK, "steps": 30, "rate": 1e-2, "keep_tokens": 4, "lora": lora}
    folder = vtc.train(case.model, None, prompts, method, tmp_path / "made", **given)
    apart = {"pool": {}, method: {"modules": str(folder)}}
    for name, options in apart.items():
        with vtc.compressed(case.model, name, keep_tokens=4, **options):
            said = [case.model(**prompt).logits[0, -1].log_softmax(-1).detach() for prompt in prompts]
        meant = [case.model(**prompt).logits[0, -1].log_softmax(-1).detach() for prompt in prompts]
        apart[name] = float(
            sum(functional.kl_div(*pair, log_target=True, reduction="sum") for pair in zip(said, meant, strict=True))
        )
    assert apart[method] < 0.8 * apart["pool"]
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    assert (folder / "adapter_model.safetensors").exists() == (lora is not None)
    told = read_modules(folder, method)[0].training
    assert (told["keep_tokens"], told["lora"]) == (4, lora)
    if lora is None:
        return
    original, calls = training._loss, iter(range(100))

    def interrupted(*args: Any, **given: Any) -> torch.Tensor:
        if next(calls) == 31:
            raise KeyboardInterrupt
        return original(*args, **given)

    monkeypatch.setattr(training, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vtc.train(case.model, None, prompts, method, tmp_path / "parts", **given)
    parts = vtc.train(case.model, None, prompts, method, tmp_path / "parts", **given)
    for name in ("modules.safetensors", "adapter_model.safetensors"):
        whole, again = (safetensors.torch.load_file(one / name) for one in (folder, parts))
        assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_new_tokens_learn_along_with_an_adapter_of_the_decoder(case: tiny.TinyCase, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    prompts = samples(case)
    folder = vtc.train(case.model, None, prompts, "llava-mini", tmp_path / "made", **{**QUICK, "lora": 2})
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    learned = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert all(bool(value.any()) for value in learned.values()), "both matrices of every layer, the zero one included"
    with_adapter = divergence(case.model, prompts, folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    assert divergence(case.model, prompts, folder) != with_adapter, "compress finds it in the folder"


def test_budgets_and_adapters_are_refused_where_they_have_no_meaning(case: tiny.TinyCase, tmp_path: Path) -> None:
    def refused(match: str, method: str, **given: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            vtc.train(case.model, None, case.rows("single"), method, tmp_path / "made", **{**QUICK, **given})
        assert not (tmp_path / "made").exists()

    refused("give keep_tokens, or keep_ratio", "crosslmm")
    refused("llava-mini takes no keep_tokens", "llava-mini", keep_tokens=4)
    refused("pixelrefer runs its modules alone", "pixelrefer", lora=2)
    refused("lora must be a rank", "crosslmm", keep_tokens=4, lora=0)
    refused("every must be an integer", "crosslmm", keep_tokens=4, every=9)
    refused("ascending layers", "vision-remember", keep_tokens=4, levels=[2, 1])
    refused("keep_tokens", "crosslmm", keep_tokens=0)
    refused("keep_ratio", "crosslmm", keep_tokens=4, keep_ratio=0.5)
