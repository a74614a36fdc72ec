"""Methods at the cache on the entries of one layer: laws that all keep, and cases worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
import vtc.kernels
from tests import reference, tiny
from tests.invariants.matrix import sharp
from tests.selectors.caches import called, context, observed, read
from vtc.core.cache_signals import AttentionSums, ResidualCosine, WindowAttention, best_chunks
from vtc.core.eviction import CacheSelector, DecodingState, Eviction, protect
from vtc.core.layer_budgets import CumulativeBudgets, parse_budgets, smallest_split
from vtc.core.stage import ModelShape
from vtc.errors import ConfigError
from vtc.registry import get_selector, selectors
from vtc.selectors import defensivekv, triattention
from vtc.selectors.triattention import future_scores

METHODS = sorted(name for name, cls in selectors().items() if issubclass(cls, CacheSelector) and name != "kvpress")
N = 24


def drawn(seed: int = 0, dtype: torch.dtype = torch.float32, batch: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = (torch.randn(batch, heads, N, 8, generator=generator) for heads in (4, 2, 2))
    return observed(queries.to(dtype), keys.to(dtype), values.to(dtype))


def method_of(name: str, **options: Any) -> Any:
    small = {"window": 4} if name in ("snapkv", "chunkkv", "defensivekv") else {}
    return get_selector(name, scope="all", **{**small, **options})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [1, 5, N - 1])
def test_keeps_exactly_the_budget_in_every_head(name: str, budget: int) -> None:
    method = method_of(name)
    answer = method.evict(read(method, drawn(), budget))
    assert answer.n == N
    assert answer.k == budget
    assert len(answer.keep) in (1, 2)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "chunkkv"])  # which ranks chunks
def test_kept_are_the_best_under_the_own_score(name: str) -> None:
    method = method_of(name)
    for seed in range(3):
        ctx = read(method, drawn(seed), 9)
        answer, scores = method.evict(ctx), method.score(ctx)
        assert scores.dtype == torch.float32
        rows = scores if scores.ndim == 2 else scores[None]
        for row, keep in zip(rows, answer.keep, strict=True):
            left = torch.ones(N, dtype=torch.bool).index_fill(0, keep, False)
            assert row[keep].min() >= row[left].max()


@pytest.mark.parametrize("name", METHODS)
def test_pure_and_repeatable(name: str) -> None:
    method = method_of(name)
    ctx = read(method, drawn(), 9)
    before, state = {s: value.clone() for s, value in ctx.signals.items()}, torch.get_rng_state()
    one, two = method.evict(ctx), method.evict(ctx)
    assert torch.equal(one.keep, two.keep)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(ctx.signals[s], value) for s, value in before.items())


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    method, raw = method_of(name), drawn(dtype=torch.bfloat16)
    wide = dataclasses.replace(raw, queries=raw.queries.float(), keys=raw.keys.float(), values=raw.values.float())
    assert torch.equal(method.evict(read(method, raw, 9)).keep, method.evict(read(method, wide, 9)).keep)


@pytest.mark.parametrize("name", METHODS)
def test_equal_entries_are_legal(name: str) -> None:
    method, raw = method_of(name), drawn()
    same = dataclasses.replace(raw, queries=torch.zeros_like(raw.queries), keys=torch.zeros_like(raw.keys))
    assert method.evict(read(method, same, 9)).k == 9


@pytest.mark.parametrize("name", METHODS)
def test_without_a_model_there_is_nothing_to_select(name: str) -> None:
    with pytest.raises(vtc.UnsupportedMethodError, match="evicts entries of key-value caches"):
        vtc.select(name, features=torch.rand(9, 4), keep_tokens=3)


@pytest.mark.parametrize("signal", [AttentionSums(), WindowAttention(3), WindowAttention(40, kernel=3)], ids=str)
def test_signals_of_a_padded_batch_are_those_of_its_rows(signal: Any) -> None:
    raw = drawn(batch=3)
    lengths = (N, 17, 2)
    valid = torch.stack([torch.arange(N) >= N - length for length in lengths])
    places = raw.visibility.query_positions.masked_fill(~valid, -1)
    padded = dataclasses.replace(raw, valid=valid, text=valid, visibility=vtc.kernels.VisibilityMask(places, places))
    values = signal.compute(padded)
    assert values.shape == (3, N, 2)
    for row, length in enumerate(lengths):
        alone = observed(*(x[row : row + 1, :, N - length :] for x in (raw.queries, raw.keys, raw.values)))
        torch.testing.assert_close(values[row, N - length :], signal.compute(alone)[0])
        assert not values[row, : N - length].any()


def test_attention_sums_are_column_sums_of_the_softmax() -> None:
    raw = drawn()
    logits = raw.queries[0] @ raw.keys[0].repeat_interleave(2, dim=0).transpose(1, 2) * raw.scaling
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    attention = logits.masked_fill(~causal, -torch.inf).softmax(dim=-1)
    sums = attention.sum(dim=1).view(2, 2, N).mean(dim=1)
    torch.testing.assert_close(AttentionSums().compute(raw)[0].T, sums)
    last = attention[:, -3:].mean(dim=1)[:, : N - 3].view(2, 2, -1).mean(dim=1)
    window = WindowAttention(3, kernel=1).compute(raw)[0].T
    torch.testing.assert_close(window[:, : N - 3], last)
    torch.testing.assert_close(window[:, N - 3 :], (last.max() + 1).expand(2, 3))


def test_earlier_turns_count_in_the_softmax_and_not_in_the_signal() -> None:
    raw = drawn()
    split = 10
    places = torch.arange(N)[None]
    later = dataclasses.replace(
        observed(raw.queries[:, :, split:], raw.keys[:, :, split:]),
        keys=raw.keys,
        visibility=vtc.kernels.VisibilityMask(places[:, split:], places),
        key_length=N,
    )
    window = WindowAttention(3, kernel=1)
    torch.testing.assert_close(window.compute(later)[0][: N - split - 3], window.compute(raw)[0][split : N - 3])


def test_h2o_keeps_half_of_the_budget_for_recent_entries() -> None:
    scores = torch.arange(N, 0, -1).float().expand(2, -1)  # the earlier, the more attention
    whole, visual = get_selector("h2o", scope="all"), get_selector("h2o")
    ctx = context(whole, N, 8, {AttentionSums(): scores})  # type: ignore[arg-type]
    assert whole.evict(ctx).keep[0].tolist() == [0, 1, 2, 3, N - 4, N - 3, N - 2, N - 1]  # type: ignore[attr-defined]
    ctx.scope = "visual"
    assert visual.evict(ctx).keep[0].tolist() == list(range(8))  # type: ignore[attr-defined]


def test_prefixkv_gives_flat_attention_more_entries_than_peaked() -> None:
    method: Any = get_selector("prefixkv")
    flat, peaked = torch.ones(1, 100), torch.full((1, 100), 1e-3).index_fill(1, torch.arange(5), 1.0)
    contexts = [
        context(method, 100, 50, {AttentionSums(): scores}, layer=i, layers=2)
        for i, scores in enumerate((flat, peaked))
    ]
    counts = method.share(contexts)
    assert 95 <= sum(counts) <= 102
    assert counts[0] > 80
    assert counts[1] < 20


def test_elastic_cache_merges_into_the_nearest() -> None:
    method: Any = get_selector("elastic-cache", scope="all", start=1)
    scores = torch.tensor([[0.0, 5.0, 1.0, 1.0, 4.0, 1.0, 0.0]])
    ctx = context(method, 7, 4, {AttentionSums(): scores})
    answer = method.evict(ctx)
    assert answer.keep.tolist() == [[0, 1, 4, 6]]
    assert answer.assign.tolist() == [[0, 1, 1, 2, 2, 2, 3]]  # 5 stands nearer to 4 than 6 does, and 6 is the end
    x = torch.arange(7.0)[None, :, None]
    assert answer.merge(x)[0, :, 0].tolist() == [0.0, 1.5, 4.0, 6.0]


def test_eviction_checks_itself() -> None:
    keep = torch.tensor([[0, 2]])
    for broken in (
        {"keep": torch.tensor([0, 2])},
        {"keep": torch.tensor([[2, 0]])},
        {"keep": torch.tensor([[0, 4]])},
        {"keep": keep, "assign": torch.tensor([[0, 0, 0, 0]])},
        {"keep": keep, "assign": torch.tensor([[0, 2, 1, 0]])},
        {"keep": keep, "assign": torch.tensor([[0, 0, 1]])},
        {"keep": keep, "weight": torch.ones(1, 4)},
        {"keep": keep, "assign": torch.tensor([[0, 0, 1, 1]]), "weight": torch.tensor([[0.0, 1, 1, 1]])},
    ):
        with pytest.raises(vtc.InputError, match="Eviction"):
            Eviction(4, **broken)
    weighted = Eviction(4, keep, torch.tensor([[0, 0, 1, -1]]), torch.tensor([[1.0, 3.0, 1.0, 0.0]]))
    assert weighted.merge(torch.tensor([[[0.0], [4.0], [7.0], [9.0]]])).flatten().tolist() == [3.0, 7.0]


def test_protected_entries_rank_above_all_others() -> None:
    scores = protect(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([True, False, False]))
    assert scores.tolist() == [[6.0, 5.0, 2.0]]


def test_clusters_are_the_best_of_all_splits() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        values = torch.rand(9, generator=generator, dtype=torch.float64).tolist()
        ranked = sorted(values)

        def cost(parts: list[list[float]]) -> float:
            return sum(sum((v - sum(p) / len(p)) ** 2 for v in p) for p in parts)

        best = min(cost([ranked[:a], ranked[a:b], ranked[b:]]) for a in range(1, 8) for b in range(a + 1, 9))
        groups = smallest_split(values, 3)
        assert cost([[v for v, g in zip(values, groups, strict=True) if g == c] for c in range(3)]) == pytest.approx(
            best
        )
    assert smallest_split([3.0, 1.0], 3) == [1, 0]


@pytest.mark.parametrize(
    "broken",
    [
        "steep",
        3,
        {},
        {"name": "pyramid", "beta": 0.5},
        {"name": "pyramid", "window": -1},
        {"name": "pyramid", "variant": "new"},
        {"name": "squeeze", "least": 2},
        {"name": "cumulative", "protect": 1.5},
        [],
        ["a"],
    ],
    ids=str,
)
def test_broken_budgets_are_refused(broken: Any) -> None:
    with pytest.raises(vtc.ConfigError, match="budgets"):
        parse_budgets(broken)


def test_chunks_stay_whole_and_the_budget_exact() -> None:
    scores = torch.tensor([1.0, 1.0, 9.0, 0.0, 4.0, 4.0, 0.0])
    chunk = torch.tensor([0, 0, 2, 2, 3, 3, 7])
    assert best_chunks(scores, chunk, 2).tolist() == [2, 3]  # 4.5, before 4.0
    assert best_chunks(scores, chunk, 3).tolist() == [2, 3, 4]
    assert best_chunks(scores, chunk, 4, "amax").tolist() == [2, 3, 4, 5]
    assert best_chunks(scores, chunk, 7).tolist() == list(range(7))
    assert best_chunks(scores[:0], chunk[:0], 0).tolist() == []


@pytest.mark.parametrize(("scope", "left"), [("visual", 0), ("all", 12)])
def test_the_laziest_layers_are_emptied(scope: str, left: int) -> None:
    method: Any = get_selector("light-transfer", budgets={"name": "lazy", "initial": 4, "recent": 8})
    (signal,) = method.stages()[0].requires
    contexts = [
        context(method, 40, 20, {signal: torch.tensor(share)}, layer=i, layers=4)
        for i, share in enumerate((0.9, 0.1, 0.95, 0.3))
    ]
    for ctx in contexts:
        ctx.scope = scope
    assert method.share(contexts) == [left, 40, left, 40]
    contexts[0].budget = left
    kept = [*range(4), *range(32, 40)] if left else []
    assert method.evict(contexts[0]).keep[0].tolist() == kept


def test_blocks_leave_inside_the_decoder() -> None:
    method: Any = get_selector("sliminfer", block=4)
    stages = method.stages(ModelShape(8), 0.125)
    assert [stage.site.layer for stage in stages] == [3, 4, 5]
    assert [stage.keep for stage in stages] == pytest.approx([0.5, 0.5, 0.5])
    scores = torch.zeros(2, 16)
    scores[0, 9], scores[1, 1] = 8.0, 4.0
    found = vtc.select("sliminfer", block=4, signals={WindowAttention: scores}, keep_tokens=8)
    assert found.keep.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "glm4v"])
@torch.no_grad()
def test_triattention_turns_the_mean_query_to_positions_behind_the_prompt(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = sharp(tiny.family(name))
    inputs, seen = case.batch("single"), []

    def watched(keys: torch.Tensor, mean: torch.Tensor, modulus: torch.Tensor, turns: torch.Tensor, how: str) -> Any:
        seen.append((keys, mean, turns))
        return future_scores(keys, mean, modulus, turns, how)

    monkeypatch.setattr(triattention, "future_scores", watched)
    with vtc.compressed(case.model, "triattention", keep_ratio=0.5, offsets=(0, 1, 64)) as model:
        model(**inputs, use_cache=True)
    deltas = getattr(case.model.base_model, "rope_deltas", None)
    end = inputs["input_ids"].shape[1] + (0 if deltas is None else int(deltas))
    frequencies = reference.text_model(case.model).rotary_emb.inv_freq.float()
    expected = torch.tensor([end, end + 1, end + 64])[:, None] * frequencies
    assert len(seen) == len(reference.text_model(case.model).layers)
    for keys, mean, turns in seen:
        assert mean.is_complex()
        assert keys.shape[0] == mean.shape[0], "one row for each query head"
        torch.testing.assert_close(turns.real, expected.cos(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(turns.imag, expected.sin(), rtol=1e-4, atol=1e-4)


def test_triattention_says_what_it_cannot_take_apart() -> None:
    raw = called(drawn(), torch.randn(16, 32))
    del raw.module.k_proj
    with pytest.raises(vtc.UnsupportedMethodError, match="but Module has no k_proj"):
        triattention.FutureAttention().compute(raw)
    raw = called(drawn(), torch.randn(16, 32))
    raw.keys[..., -1] += 3
    with pytest.raises(vtc.UnsupportedMethodError, match="rotated in no pairs that are known"):
        triattention.FutureAttention().compute(raw)
    with pytest.raises(vtc.ConfigError, match="offsets are integers"):
        get_selector("triattention", offsets=(1, -2))


def test_defensivekv_reads_a_plain_output_projection() -> None:
    raw = called(drawn(), torch.randn(16, 32))
    norms = defensivekv.OutputNorms().compute(raw)[0]
    assert norms.shape == (N, 2)
    torch.testing.assert_close(norms.sum(dim=1), torch.ones(N))
    raw.module.o_proj = torch.nn.Identity()
    with pytest.raises(vtc.UnsupportedMethodError, match="o_proj with an unquantized weight"):
        defensivekv.OutputNorms().compute(raw)


def test_counts_follow_the_ratio_where_the_budget_was_rounded() -> None:
    def asked(n: int, budget: int, ratio: float, signals: Any) -> Any:
        return context(get_selector("streaming"), n, budget, signals, layers=3, keep_ratio=ratio, heads=1)

    layers = [asked(7, 4, 0.5, {ResidualCosine(): torch.tensor(cosine)}) for cosine in (0.1, 0.5, 0.9)]
    assert parse_budgets({"name": "squeeze", "least": 0.1}).share(layers) == [4, 4, 0], "(3 * 0.5 - 0.1) / 2 is 0.7"
    even = asked(49, 24, 0.5, {AttentionSums(): torch.ones(1, 49)})
    assert parse_budgets("cumulative").share([even]) == [25], "24.5 leave, rounded down"
    method = method_of("defensivekv", window=1, coverage=1.0)
    scores = [torch.ones(1, 52), torch.full((1, 52), -1.0), torch.ones(1, 52)]
    ctx = asked(52, 5, 0.1, dict(zip(method.reads(), scores, strict=True)))
    assert int((method.score(ctx) > 1).sum()) == 5, "int(51 * 0.1 - 1) entries, and the window"
    # Where layers share the budget, it is the layer's own.
    ctx.budget = 26
    assert ctx.fraction == 0.5


def test_what_prefixkv_protects_is_beside_its_prefix() -> None:
    assert get_selector("prefixkv", scope="all", start=3).layer_budgets == CumulativeBudgets(protect=4)
    assert get_selector("prefixkv").layer_budgets == CumulativeBudgets(), "text stays anyway"
    with pytest.raises(ConfigError, match="start"):
        get_selector("prefixkv", scope="all", start="one")


def test_a_profile_is_not_rounded_while_decoding() -> None:
    """Of 10 entries 0.25 are 2 or 3: the profile, and not what it came to, says how many the next tokens may add."""
    profile = get_selector("prefixkv", scope="all", budgets=(0.25,))
    cumulative = get_selector("prefixkv", scope="all")
    for seen in range(11, 40):
        state = DecodingState(0, 4, 2, seen, 10)
        assert profile.leaving(state).count == int(4 - 0.25 * seen >= 1)
        assert cumulative.leaving(state).count == int(4 - 0.2 * seen >= 1)
        assert profile.leaving(DecodingState(0, 5, 4, seen, 10)) == cumulative.leaving(DecodingState(0, 5, 4, seen, 10))
