"""Invariant 5: models do not see each other, and neither do threads, be it on two models or on one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vtc
from tests import tiny
from tests.invariants.matrix import METHODS, REPRESENTATIVES, Method, borrowed, build, method, over_matrix


def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


@over_matrix(
    methods=tuple(m for m in METHODS if m.name in ("vtc-cls", "fastv", "divprune+fastv")), attentions=("sdpa",)
)
def test_an_untouched_model_beside_a_compressed_one(family: tiny.Family, method: Method, attention: str) -> None:
    compressed, untouched = borrowed(family, attention), build(family, attention, seed=1)
    theirs, ours = untouched.batch("ragged"), compressed.batch("ragged")
    expected = answer(untouched.model, theirs)
    with method.on(compressed.model):
        alone = answer(compressed.model, ours)
        assert torch.equal(answer(untouched.model, theirs), expected)
        assert torch.equal(answer(compressed.model, ours), alone)
    assert not vtc.is_compressed(untouched.model)


def test_two_compressed_models_interleaved() -> None:
    first, second = build(tiny.family("llava")), build(tiny.family("qwen3_vl"))
    a, b = first.batch("ragged"), second.batch("ragged")
    with method("vtc-cls").on(first.model):
        alone_a = answer(first.model, a)
    with method("fastv").on(second.model):
        alone_b = answer(second.model, b)
    method("vtc-cls").compress(first.model)
    method("fastv").compress(second.model)
    assert torch.equal(answer(first.model, a), alone_a)
    assert torch.equal(answer(second.model, b), alone_b)
    assert torch.equal(answer(first.model, a), alone_a)
    # In the order of installation, not of a stack: the first goes first.
    vtc.restore(first.model)
    assert torch.equal(answer(second.model, b), alone_b)
    vtc.restore(second.model)
    assert not vtc.is_compressed(first.model)
    assert not vtc.is_compressed(second.model)


@pytest.mark.parametrize("names", [("vtc-cls", "vtc-cls"), ("vtc-cls", "fastv"), ("fastv", "divprune+fastv")])
def test_two_threads(names: tuple[str, str]) -> None:
    cases = [build(tiny.family("llava")), build(tiny.family("internvl"), seed=1)]
    batches = [case.batch("ragged") for case in cases]
    expected = []
    for case, inputs, name in zip(cases, batches, names, strict=True):
        with method(name).on(case.model):
            expected.append(answer(case.model, inputs))

    start = threading.Barrier(2)
    failures: list[BaseException] = []

    def work(index: int) -> Callable[[], None]:
        def run() -> None:
            try:
                start.wait(timeout=30)
                for _ in range(5):
                    # Installing and removing is part of what must not disturb the other thread.
                    with method(names[index]).on(cases[index].model) as model:
                        got = answer(model, batches[index])
                    assert torch.equal(got, expected[index])
            except BaseException as error:  # handed to the main thread
                failures.append(error)

        return run

    threads = [threading.Thread(target=work(index)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize("second", ["divprune", "fastv", "divprune+fastv"])
@pytest.mark.parametrize("first", ["random", "fastv", "divprune+fastv"])
def test_compressing_twice_is_compressing_once_with_the_second(name: str, first: str, second: str) -> None:
    once, twice = borrowed(tiny.family(name)), build(tiny.family(name))
    inputs = once.batch("ragged")
    plain = once.once("an answer", lambda: answer(once.model, inputs))
    with method(second).on(once.model):
        expected = answer(once.model, inputs)
    method(first).compress(twice.model)
    answer(twice.model, inputs)
    method(second).compress(twice.model)
    assert torch.equal(answer(twice.model, inputs), expected)
    vtc.restore(twice.model)  # one restore undoes both
    assert not vtc.is_compressed(twice.model)
    assert torch.equal(answer(twice.model, inputs), plain)


def test_state_resets_at_every_prefill() -> None:
    case = build(tiny.family("llava"))
    batches = [case.batch(kind) for kind in ("ragged", "single", "text_only", "no_image_row", "two_images")]
    alone = []
    for inputs in batches:
        with method("divprune+fastv").on(case.model) as model:
            alone.append(answer(model, inputs))
    with method("divprune+fastv").on(case.model) as model:
        for inputs, expected in zip(batches + batches[::-1], alone + alone[::-1], strict=True):
            assert torch.equal(answer(model, inputs), expected)


@pytest.mark.parametrize("name", ["divprune", "vtc-cls", "fastv", "divprune+fastv"])
def test_threads_on_one_model(name: str) -> None:
    case = build(tiny.family("llava"))
    batches = [case.batch(kind) for kind in ("single", "ragged", "two_images", "no_image_row")]
    with method(name).on(case.model) as model:
        expected = [answer(model, inputs) for inputs in batches]
        start, failures = threading.Barrier(len(batches)), []

        def work(inputs: dict[str, Any], alone: torch.Tensor) -> None:
            try:
                start.wait(timeout=30)
                for _ in range(4):
                    assert torch.equal(answer(model, inputs), alone)
            except BaseException as error:  # handed to the main thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
