"""The greedy picks against their definitions: on random rows, on rows full of ties, and with every bound in use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import near_ties
from vtc import kernels
from vtc.bench.memory import peak_bytes
from vtc.kernels import cosines, cover, greedy, pick, reference

GOLDEN = Path(__file__).parent.parent / "golden"
quick = settings(max_examples=40, deadline=None)


@pytest.fixture(params=["as they are", "tiny", "queued"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and pools so small that every loop iterates several times on a small input; or what a GPU would run."""
    if request.param == "tiny":
        shrink(monkeypatch)
    if request.param == "queued":
        monkeypatch.setattr(greedy, "queues", lambda x: True)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, size in [
        (pick, "_TILE", 2),
        (pick, "_POOL", 3),
        (pick, "_PROBES", 2),
        (pick, "_FIRST_PROBES", 1),
        (pick, "_MAX_TILE", 3),
        (pick, "_GUESSED", 3),
        (pick, "_CACHED", 0),
        (greedy, "_POOL", 3),
        (greedy, "_BATCH", 2),
        (cosines, "_BLOCK", 4),
        (cosines, "WORKSPACE", 0),
    ]:
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(cover, "_STRIPE", 5)
    monkeypatch.setattr("vtc.kernels.cosines._STRIPE", 5)


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    """Rows that are random, clustered, or full of duplicates, zeros and right angles."""
    n, width = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kind = draw(st.sampled_from(["random", "clustered", "duplicates", "axes"]))
    x = torch.randn(n, width, generator=generator)
    if kind == "clustered":
        x = x * 0.1 + torch.randn(3, width, generator=generator)[torch.randint(3, (n,), generator=generator)]
    elif kind == "duplicates":
        x = x[torch.randint(n, (n,), generator=generator)]
        x[torch.rand(n, generator=generator) < 0.2] = 0
    elif kind == "axes":
        x = torch.eye(width)[torch.randint(width, (n,), generator=generator)]
        x *= torch.randint(-1, 2, (n, 1), generator=generator)
    return x.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


@pytest.mark.usefixtures("sizes")
@quick
@given(rows(), st.integers(0, 45), st.booleans())
def test_farthest_point(x: torch.Tensor, k: int, given_first: bool) -> None:
    first = len(x) // 2 if given_first else None
    for function in (kernels.farthest_point, reference.farthest_point):
        near_ties.assert_greedy(function(x, k, first), x, k, near_ties.isolation(first))


@pytest.mark.usefixtures("sizes")
@quick
@given(rows(), st.integers(0, 45))
def test_max_sum(x: torch.Tensor, k: int) -> None:
    for function in (kernels.max_sum, reference.max_sum):
        picks = function(x, k, len(x) // 3)
        near_ties.assert_greedy(picks, x, k, near_ties.distance_to_all(len(x) // 3), 2e-6 * len(x))


@pytest.mark.usefixtures("sizes")
@quick
@given(rows(), st.integers(0, 45), st.booleans())
def test_dpp_greedy(x: torch.Tensor, k: int, equal: bool) -> None:
    relevance = torch.ones(len(x)) if equal else torch.linspace(1, 0.2, len(x))
    for function in (kernels.dpp_greedy, reference.dpp_greedy):
        picks = function(x, k, None if equal else relevance)
        near_ties.assert_greedy(picks, x, k, near_ties.volume(relevance), 4e-5)


@pytest.mark.usefixtures("sizes")
@quick
@given(rows(), st.integers(0, 45), st.sampled_from([0.0, 1e-3]))
def test_dpp_greedy_with_places(x: torch.Tensor, k: int, ridge: float) -> None:
    relevance = torch.linspace(1, 0.5, len(x))
    places = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(k))
    for function in (kernels.dpp_greedy, reference.dpp_greedy):
        picks = function(x, k, relevance, places, ridge)
        near_ties.assert_greedy(picks, x, k, near_ties.volume(relevance, places, ridge), 4e-5)


@pytest.mark.usefixtures("sizes")
@quick
@given(rows(), st.integers(0, 45), st.sampled_from([None, "multiply", "add"]))
def test_coverage_greedy(x: torch.Tensor, k: int, combine: str | None) -> None:
    weight = None if combine is None else torch.linspace(0, 2, len(x))
    for function in (kernels.coverage_greedy, reference.coverage_greedy):
        picks = function(x, k, weight, combine or "multiply")
        near_ties.assert_greedy(picks, x, k, near_ties.coverage(weight, combine or "multiply"), 1e-5 * len(x))


@pytest.mark.usefixtures("sizes")
def test_ties_go_to_the_lower_index() -> None:
    axes = torch.eye(6)[[0, 1, 0, 2, 1, 2]]  # cosines are 0 and 1, without rounding
    assert kernels.farthest_point(axes, 6).tolist() == [0, 1, 3, 2, 4, 5]
    assert kernels.farthest_point(torch.eye(6), 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert kernels.max_sum(axes, 6, 2).tolist() == [2, 1, 3, 0, 4, 5]
    assert kernels.dpp_greedy(axes, 6).tolist() == [0, 1, 3, 2, 4, 5]
    assert kernels.coverage_greedy(axes, 6).tolist() == [0, 1, 3, 2, 4, 5]


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_rows_and_nothing(dtype: torch.dtype) -> None:
    for x in (torch.zeros(5, 3, dtype=dtype), torch.zeros(0, 3, dtype=dtype)):
        every = list(range(len(x)))
        for picks in (
            kernels.farthest_point(x, 9),
            kernels.max_sum(x, 9, 0),
            kernels.dpp_greedy(x, 9),
            kernels.coverage_greedy(x, 9),
        ):
            assert picks.dtype == torch.long
            assert picks.tolist() == every
        for nothing in (kernels.farthest_point(x, 0), kernels.dpp_greedy(x, 0), kernels.coverage_greedy(x, 0)):
            assert nothing.shape == (0,)
            assert nothing.dtype == torch.long


def test_beyond_its_rank_a_point_process_takes_the_most_relevant() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    relevance = torch.tensor([1.0, 0.3, 0.9, 0.5, 0.6])
    assert kernels.dpp_greedy(x, 5, relevance).tolist() == [0, 2, 4, 3, 1]
    assert reference.dpp_greedy(x, 5, relevance).tolist() == [0, 2, 4, 3, 1]


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_a_thousand_rows(shift: float) -> None:
    """Large enough for tiles and pools of their real sizes; the picks are equal, not only equally good."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1100, 48, generator=generator) + shift * torch.randn(48, generator=generator)
    relevance = torch.rand(1100, generator=generator)
    assert torch.equal(kernels.farthest_point(x, 90), reference.farthest_point(x, 90))
    assert torch.equal(kernels.max_sum(x, 90, 5), reference.max_sum(x, 90, 5))
    assert torch.equal(kernels.dpp_greedy(x, 40, relevance), reference.dpp_greedy(x, 40, relevance))
    there = (x, 90, relevance, torch.rand(1100, 3, generator=generator), 1e-4)
    assert torch.equal(kernels.dpp_greedy(*there), reference.dpp_greedy(*there))
    assert torch.equal(kernels.coverage_greedy(x, 40, relevance), reference.coverage_greedy(x, 40, relevance))


def test_the_point_process_picks_what_its_authors_pick() -> None:
    cases = np.load(GOLDEN / "cdpruner.npz")
    for case in (0, 3):
        normalize = torch.nn.functional.normalize
        features = torch.from_numpy(cases[f"c{case}_image_features"])[0]
        embeds = normalize(torch.from_numpy(cases[f"c{case}_image_embeds"])[0], dim=-1)
        text = normalize(torch.from_numpy(cases[f"c{case}_text_embeds"]).view(-1, embeds.shape[-1]), dim=-1)
        relevance = -(embeds @ text.T).mean(dim=-1)
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        kept = np.flatnonzero(cases[f"c{case}_mask"][0]).tolist()
        for function in (kernels.dpp_greedy, reference.dpp_greedy):
            assert sorted(function(features, len(kept), relevance).tolist()) == kept


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("case", [0, 2, 3, 5])
def test_coverage_picks_what_its_authors_pick(case: int) -> None:
    cases = np.load(GOLDEN / "scope.npz")
    x = torch.from_numpy(cases[f"c{case}_x"][0])
    weight = torch.from_numpy(cases[f"c{case}_cls_attn"][0]) ** float(cases[f"c{case}_alpha"])
    combine = {"multi": "multiply", "add": "add"}[str(cases[f"c{case}_combined"])]
    order = cases[f"c{case}_order"][0].tolist()
    for function in (kernels.coverage_greedy, reference.coverage_greedy):
        assert function(x, len(order), weight, combine).tolist() == order


def test_a_matrix_of_similarities_may_be_larger_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert greedy.stores(torch.empty(16384, 1))
    assert not greedy.stores(torch.empty(16385, 1))
    monkeypatch.setattr(greedy, "queues", lambda x: True)
    assert greedy.stores(torch.empty(4096, 1))
    assert not greedy.stores(torch.empty(4097, 1))


def test_picks_of_sums_are_guessed_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows too many for a cache and for a matrix are read once for all right guesses, not once per pick."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 32, generator=generator)[torch.randint(40, (1500,), generator=generator)]
    x = x + 0.5 * torch.randn(1500, 32, generator=generator)
    monkeypatch.setattr(pick, "_CACHED", 0)
    monkeypatch.setattr(cosines, "WORKSPACE", 0)
    monkeypatch.setattr(pick, "_GUESSED", 400)
    guessed: list[int] = []
    products = cosines.products

    def counted(x: torch.Tensor, scale: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        guessed.append(len(others))
        return products(x, scale, others)

    monkeypatch.setattr(cosines, "products", counted)
    assert torch.equal(kernels.max_sum(x, 150, 7), reference.max_sum(x, 150, 7))
    assert len(guessed) < 75  # of 150


def test_noise_is_searched_in_linear_memory() -> None:
    # No row can be excluded early there, so that ever larger sets of rows have to be compared.
    peaks = {}
    for n in (8000, 32000):
        x = torch.randn(n, 128, generator=torch.Generator().manual_seed(n))
        peaks[n] = peak_bytes(lambda x=x: kernels.farthest_point(x, 4))
    assert peaks[32000] < 4.5 * peaks[8000]


# --- distances with a bonus, and coverage of other things ------------------------------------------------------------


@pytest.mark.usefixtures("sizes")
@quick
@given(rows(), st.integers(0, 45), st.sampled_from([0.0, 0.5, 3.0]))
def test_relevant_farthest_point(x: torch.Tensor, k: int, weight: float) -> None:
    bonus = weight * torch.rand(len(x), generator=torch.Generator().manual_seed(1))
    for function in (kernels.relevant_farthest_point, reference.relevant_farthest_point):
        near_ties.assert_greedy(function(x, k, bonus), x, k, near_ties.relevance(bonus))


@pytest.mark.usefixtures("sizes")
@quick
@given(rows(), st.integers(0, 45))
def test_weighted_coverage(x: torch.Tensor, k: int) -> None:
    demand = torch.rand(len(x), generator=torch.Generator().manual_seed(1))

    def worth(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        table = demand.double()[:, None] * (1 + similarity) / 2
        covered = table[:, picks].amax(dim=1, keepdim=True) if picks else 0.0
        return (table - covered).clamp(min=0).sum(dim=0)

    near_ties.assert_greedy(kernels.weighted_coverage(x, k, demand), x, k, worth, 1e-5 * len(x))
    near_ties.assert_greedy(reference.weighted_coverage(x, k, demand), x, k, worth, 1e-5 * len(x))


@pytest.mark.usefixtures("sizes")
@quick
@given(rows(), st.integers(0, 45), st.integers(0, 4), st.sampled_from([0.02, 0.2]))
def test_multimodal_coverage(x: torch.Tensor, k: int, words: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(words, x.shape[1], generator=generator)
    metric = torch.randn(len(x), 5, generator=generator).index_fill_(0, torch.tensor(0), 0.0)

    def worth(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        unit = [torch.nn.functional.normalize(part.double(), dim=1, eps=1e-12) for part in (text, x)]
        asked = (unit[0] @ unit[1].T / 0.01).softmax(dim=1) / max(1, words)
        table = torch.cat([asked, 0.5 * (near_ties.cosines(metric) / temperature).softmax(dim=1) / len(x)])
        covered = table[:, picks].amax(dim=1, keepdim=True) if picks else 0.0
        return (table - covered).clamp(min=0).sum(dim=0)

    arguments = (x, k, text, metric, 0.5, 0.01, temperature)
    near_ties.assert_greedy(kernels.multimodal_coverage(*arguments), x, k, worth, 1e-5 * len(x))
    near_ties.assert_greedy(reference.multimodal_coverage(*arguments), x, k, worth, 1e-5 * len(x))
