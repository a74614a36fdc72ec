"""The search for tokens that answer: what it proposes is what the model gets, and it never ends at something worse."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import vtc
import vtc.reference
from eval import models, search
from eval.tasks import get_task
from vtc import registry

pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")


@pytest.fixture(scope="module")
def searcher() -> Iterator[search.Searcher]:
    if not vtc.reference.available():
        pytest.skip("the reference models are not installed")
    task = get_task("scenes", pictures=1, per_picture=4)
    samples = list(task.samples(None))
    yield search.Searcher(
        models.load("reference:llava"),
        task,
        samples,
        samples[0].open(),
        candidates=4,
        steps=3,
        rng=np.random.default_rng(0),
    )
    registry._SELECTORS._classes.pop(search.GivenSelector.name)  # other tests list the methods
    search.register.cache_clear()


def test_a_changed_set_is_as_large_and_differs_by_as_many(searcher: search.Searcher) -> None:
    kept = torch.arange(0, 60, 5)
    changed = searcher._changed(kept, 256, 3)
    assert len(changed) == len(set(changed.tolist())) == 12
    assert len({*kept.tolist()} - {*changed.tolist()}) == 3
    assert int(changed.max()) < 256


def test_the_model_gets_the_set_of_its_row(searcher: search.Searcher) -> None:
    """The likelihood of a set does not depend on what else is tried beside it."""
    sets = [torch.arange(0, 256, 16), torch.arange(3, 259, 16), torch.arange(0, 256, 16)]
    together = searcher._likelihood([0], sets)
    alone = torch.cat([searcher._likelihood([0], [each]) for each in sets])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    assert together[0] == pytest.approx(float(together[2]), abs=1e-5)
    assert abs(float(together[0] - together[1])) > 1e-4


def test_the_search_ends_at_nothing_worse(searcher: search.Searcher) -> None:
    kept, total, scores = searcher.start(vtc.CompressionConfig("random", keep_ratio=0.056))
    assert total == 256
    assert len(scores) == 4
    before = searcher._likelihood([1], [kept])
    found = searcher.search([1], kept, total)
    assert len(found) == len(kept)
    assert float(searcher._likelihood([1], [found])) >= float(before)


def test_the_table_has_both_kinds() -> None:
    found = [
        search.Found("question", "a", 1.0, 0.0, 1.0),
        search.Found("question", "b", 1.0, 1.0, 1.0),
        search.Found("picture", "a", 1.0, 1.0, 0.0),
    ]
    table = search.to_markdown(found, "vtc", 0.056)
    assert "| each question | 1.000 | 0.500 | 1.000 | +0.500 |" in table
    assert "| 1.000 | 1.000 | 0.000 | -1.000 |" in table
