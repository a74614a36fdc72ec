"""Calls of one model that run at the same time or inside each other: each has its own state and its own report."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.streamers import BaseStreamer

import vtc
from tests import tiny
from tests.invariants.matrix import build, method
from vtc import registry
from vtc.engine.calls import Calls

GREEDY = {"max_new_tokens": 5, "do_sample": False}
KINDS = ("single", "ragged", "two_images", "no_image_row", "text_only")
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")


def kept(report: vtc.Report) -> list[list[int]]:
    return [segment.kept.tolist() for segment in report.segments]


def run_at_once(*work: Callable[[], None]) -> None:
    """Run these functions in a thread each; the first exception is raised here."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(work))

    def attempt(function: Callable[[], None]) -> None:
        try:
            start.wait(timeout=30)
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


class Tokens(BaseStreamer):
    """A streamer that a thread reads while another generates."""

    def __init__(self, on_put: Callable[[], None] = lambda: None) -> None:
        self.queue: queue.Queue[torch.Tensor | None] = queue.Queue()
        self.on_put = on_put

    def put(self, value: torch.Tensor) -> None:
        self.on_put()
        self.queue.put(value)

    def end(self) -> None:
        self.queue.put(None)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(functools.partial(self.queue.get, timeout=60), None)


# ------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["divprune", "fastv", "divprune+fastv", "divprune at vision:1"])
def test_threads_get_their_own_answers_and_reports(family: str, name: str) -> None:
    case = build(tiny.family(family))
    batches = [case.batch(kind) for kind in KINDS]
    with method(name).on(case.model) as model:
        expected = []
        for inputs in batches:
            answer = model.generate(**inputs, **GREEDY)
            expected.append((answer, kept(vtc.report(model))))

        def work(index: int) -> None:
            for turn in range(len(KINDS)):
                which = (index + turn) % len(KINDS)
                answer = model.generate(**batches[which], **GREEDY)
                assert torch.equal(answer, expected[which][0])
                assert kept(vtc.report(model)) == expected[which][1]

        run_at_once(*[functools.partial(work, index) for index in range(3)])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_threads_do_not_see_each_others_towers(family: str) -> None:
    # One method reads pixels and queries of the tower, the other hidden states.
    @dataclasses.dataclass(frozen=True)
    class Brightest(vtc.ScoreSelector):
        name, paper = "brightest", "a test"
        requires = (vtc.PreProjector(layers=(0, 1)),)

        def score(self, ctx: vtc.VisualContext) -> torch.Tensor:
            return ctx[vtc.PreProjector].float().sum(dim=1)

    vtc.register_selector(Brightest)
    try:
        for config in (
            vtc.CompressionConfig("vflowopt", keep_ratio=0.4, options={"t": 1.2, "cell": 2.0}),
            vtc.CompressionConfig("brightest", keep_ratio=0.4),
        ):
            case = build(tiny.family(family))
            batches = [case.batch(kind) for kind in ("single", "ragged", "two_images")]
            with vtc.compressed(case.model, config) as model, torch.no_grad():
                expected = [model(**inputs).logits for inputs in batches]

                def work(index: int, model: Any, batches: list[Any], expected: list[torch.Tensor]) -> None:
                    for _ in range(15):
                        with torch.no_grad():
                            assert torch.equal(model(**batches[index]).logits, expected[index])

                run_at_once(*[functools.partial(work, index, model, batches, expected) for index in range(3)])
    finally:
        registry._SELECTORS._classes.pop("brightest")


def test_threads_are_not_made_to_wait_for_each_other() -> None:
    case = build(tiny.family("llava"))
    inputs, meet = case.batch("single"), threading.Barrier(2)
    with method("divprune+fastv").on(case.model) as model:

        def work() -> None:
            # Each waits, in the middle of its generate, for the other to be there as well.
            model.generate(**inputs, **GREEDY, streamer=Tokens(functools.partial(meet.wait, timeout=60)))

        run_at_once(work, work)


def test_tasks_get_their_own_answers_and_reports() -> None:
    case = build(tiny.family("llava"))
    batches = [case.batch(kind) for kind in KINDS]

    async def ask(model: Any, inputs: Any) -> tuple[torch.Tensor, list[vtc.Report]]:
        with vtc.reports(model) as reports:
            answer = await asyncio.to_thread(model.generate, **inputs, **GREEDY)
            await asyncio.to_thread(model.generate, **batches[0], **GREEDY)
        return answer, reports

    async def ask_all(model: Any) -> list[tuple[torch.Tensor, list[vtc.Report]]]:
        return await asyncio.gather(*[ask(model, inputs) for inputs in batches])

    with method("divprune+fastv").on(case.model) as model:
        expected = []
        for inputs in batches:
            answer = model.generate(**inputs, **GREEDY)
            expected.append((answer, kept(vtc.report(model))))
        for (answer, reports), (alone, report) in zip(asyncio.run(ask_all(model)), expected, strict=True):
            assert torch.equal(answer, alone)
            assert [kept(each) for each in reports] == [report, expected[0][1]]


def test_reports_are_collected_of_copied_contexts_and_no_others() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("two_images")
    with method("divprune").on(case.model) as model:
        with vtc.reports(model) as outer, vtc.reports(model) as reports:
            generate = functools.partial(model.generate, **inputs, **GREEDY)
            for target in (functools.partial(contextvars.copy_context().run, generate), generate):
                thread = threading.Thread(target=target)
                thread.start()
                thread.join()
            model(**case.batch("single"))
        model(**inputs)
        assert [len(report.segments) for report in reports] == [4, 1]
        assert len(outer) == 2


def test_a_streamer_is_read_beside_its_thread() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    with method("divprune").on(case.model) as model:
        expected = model.generate(**inputs, **GREEDY)
        streamer = Tokens()
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
        thread.start()
        _prompt, *tokens = streamer
        thread.join()
        assert torch.equal(torch.stack([token[0] for token in tokens]), expected[0, -len(tokens) :])


def test_a_report_for_a_thread_that_ran_nothing() -> None:
    case = build(tiny.family("llava"))
    single, two = case.batch("single"), case.batch("two_images")
    with method("divprune").on(case.model) as model:
        with pytest.raises(vtc.StateError, match="nothing to report yet"):
            vtc.report(model)
        for inputs, segments in ((single, 1), (two, 4)):  # one after the other, as with a streamer
            thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY})
            thread.start()
            thread.join()
            assert len(vtc.report(model).segments) == segments
        meet = threading.Barrier(2)

        def work() -> None:
            model.generate(**single, **GREEDY, streamer=Tokens(functools.partial(meet.wait, timeout=60)))
            assert len(vtc.report(model).segments) == 1

        run_at_once(work, work)
        with pytest.raises(vtc.StateError, match="several threads"):
            vtc.report(model)


def test_disabling_is_a_matter_of_one_thread() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("ragged")
    plain = case.model.generate(**inputs, **GREEDY)
    with method("divprune").on(case.model) as model:
        packed = model.generate(**inputs, **GREEDY)
        assert not torch.equal(packed, plain)

        def compressed() -> None:
            for _ in range(5):
                assert torch.equal(model.generate(**inputs, **GREEDY), packed)

        def untouched() -> None:
            for _ in range(5):
                with vtc.disabled(model):
                    assert torch.equal(model.generate(**inputs, **GREEDY), plain)

        run_at_once(compressed, untouched)


@pytest.mark.parametrize("where", ["in the call", "in another thread"])
def test_the_compression_is_not_changed_under_a_running_call(where: str) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    failures: list[str] = []

    def change() -> None:
        for verb in (
            lambda: vtc.restore(case.model),
            lambda: vtc.compress(case.model, "random", keep_ratio=0.5),
            lambda: vtc.compressed(case.model, "random", keep_ratio=0.5).__enter__(),
        ):
            try:
                verb()
            except vtc.StateError as error:
                failures.append(str(error))

    def in_between() -> None:
        if where == "in the call":
            return change()
        thread = threading.Thread(target=change)
        thread.start()
        thread.join()
        return None

    with method("divprune").on(case.model) as model:
        expected = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, streamer=Tokens(in_between)), expected)
        assert len(failures) == 3 * (GREEDY["max_new_tokens"] + 1)
        assert all("1 call of this model is running" in message for message in failures)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("bare", [True, False])
def test_a_call_that_fails_is_closed(error: type[BaseException], bare: bool) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("ragged")
    with method("divprune+fastv").on(case.model) as model:
        expected = model.generate(**inputs, **GREEDY)

        def fail(*_: Any) -> None:
            raise error

        with model.model.language_model.layers[3].register_forward_hook(fail), pytest.raises(error):
            model(**inputs) if bare else model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert not vtc.is_compressed(case.model)  # so restoring was not refused


def test_a_call_that_is_interrupted_while_it_opens_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(tiny.family("llava"))
    inputs, opens = case.batch("ragged"), Calls.open

    def interrupted(self: Calls, call: Any) -> None:
        opens(self, call)
        raise KeyboardInterrupt

    with method("divprune").on(case.model) as model:
        expected = model.generate(**inputs, **GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(Calls, "open", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        vtc.report(model)
    assert not vtc.is_compressed(case.model)


# --------------------------------------------------------------------------------------------- calls inside calls


class Asks(transformers.LogitsProcessor):
    """Runs something at every step of a generate and leaves the scores as they are."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask = ask

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.ask()
        return scores


MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("family", [*FAMILIES, "paligemma"])
def test_a_call_inside_a_call_disturbs_nothing(family: str, name: str, mode: str) -> None:
    case = build(tiny.family(family))
    # One picture each: Qwen keeps the offsets of its last prompt on the model, as many as that had rows.
    inputs, other = case.batch("single"), case.collate([tiny.Row(3, 3, ((None, 1),), 6)])
    words = {"input_ids": torch.tensor([[1, 5, 6]])}
    said = {**GREEDY, **MODES[mode]}
    with method(name).on(case.model) as model:
        expected, report = model.generate(**inputs, **said), kept(vtc.report(model))
        inner = {kind: model.generate(**other, **GREEDY, **kind_of) for kind, kind_of in MODES.items()}
        calls = [lambda: model(**words, use_cache=False), lambda: model(**other, use_cache=False)]
        calls += [
            lambda kind=kind: torch.testing.assert_close(model.generate(**other, **GREEDY, **MODES[kind]), inner[kind])
            for kind in ("dynamic", "no cache")
        ]
        for ask in calls:
            model.generate(**inputs, **GREEDY)
            answer = model.generate(**inputs, **said, logits_processor=[Asks(ask)])
            assert torch.equal(answer, expected)
            assert kept(vtc.report(model)) == report


@pytest.mark.parametrize("mode", ["dynamic", "static", "no cache"])
@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("family", ["llava", "internvl", "gemma3", "paligemma"])  # transformers' own fails on Qwen-VL
def test_classifier_free_guidance(family: str, name: str, mode: str) -> None:
    case, twin = build(tiny.family(family)), build(tiny.family(family))
    inputs = case.batch("single")
    said = {**GREEDY, **MODES[mode]}
    # The unconditional passes by a model that knows nothing of the compressed one.
    guidance = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
        1.5, twin.model, use_cache=mode != "no cache"
    )
    with method(name).on(case.model) as model:
        expected = model.generate(**inputs, **said, logits_processor=[guidance])
        report = kept(vtc.report(model))
        assert torch.equal(model.generate(**inputs, **said, guidance_scale=1.5), expected)
        assert kept(vtc.report(model)) == report
        assert len(report) == 1
