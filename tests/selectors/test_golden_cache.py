"""Methods at the cache against the authors' own functions; see tests/golden/README.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.selectors.caches import called, context, observed, read
from tests.selectors.test_golden import GOLDEN, load
from vtc.core.cache_signals import AttentionSums, LocalAttention, ResidualCosine, WindowAttention
from vtc.core.eviction import DecodingState
from vtc.core.layer_budgets import PyramidBudgets, SqueezeBudgets, cumulative_drops, smallest_split
from vtc.kernels import topk_indices
from vtc.registry import get_selector
from vtc.selectors.gemfilter import LastQueryLogits
from vtc.selectors.triattention import future_scores


def names(pattern: str, least: int) -> list[str]:
    found = sorted(path.name for path in GOLDEN.glob(pattern))
    assert len(found) >= least
    return found


def padded(rows: torch.Tensor) -> list[list[int]]:
    return [[int(i) for i in row if i >= 0] for row in rows]


@pytest.mark.parametrize("name", names("snapkv_official_*", 3))
def test_snapkv(name: str) -> None:
    golden = load(name)
    pooling = "max" if golden["pooling_is_max"] else "mean"
    method: Any = get_selector(
        "snapkv", scope="all", window=golden["window"], kernel=golden["kernel_size"], pooling=pooling
    )
    ctx = read(method, observed(golden["queries"], golden["keys"]), golden["capacity"])
    assert torch.equal(method.evict(ctx).keep, golden["kept_positions_sorted"][0])


def test_snapkv_with_shared_keys() -> None:
    golden = load("kvpress_snapkv_01.npz")
    window, n = golden["window"], golden["keys"].shape[2]
    queries = torch.nn.functional.pad(golden["queries_window"], (0, 0, n - window, 0))
    method: Any = get_selector("snapkv", scope="all", window=window, kernel=golden["kernel_size"])
    ctx = read(method, observed(queries, golden["keys"]), int(n * (1 - golden["compression_ratio"])))
    ours, theirs = ctx[WindowAttention], golden["scores"][0]
    torch.testing.assert_close(ours[:, : n - window], theirs[:, : n - window], rtol=1e-4, atol=1e-5)
    assert torch.equal(method.evict(ctx).keep, golden["kept_positions_sorted"][0])


@pytest.mark.parametrize("name", names("kvfactory_pyramidkv_*", 3))
def test_pyramidkv(name: str) -> None:
    golden = load(name)
    budgets: Any = {"name": "pyramid", "beta": golden["beta"]} if golden["beta"] != 20 else "pyramid"
    method: Any = get_selector(
        "snapkv", scope="all", window=golden["window"], kernel=golden["kernel_size"], budgets=budgets
    )
    raw, depth = observed(golden["queries"], golden["keys"]), golden["num_hidden_layers"]
    contexts = [read(method, raw, golden["capacity"], layer=layer, layers=depth) for layer in range(depth)]
    ctx = contexts[golden["layer_idx"]]
    ctx.budget = method.share(contexts)[golden["layer_idx"]]
    assert torch.equal(method.evict(ctx).keep, golden["kept_positions_sorted"][0])


def test_pyramid_budgets_by_true_division() -> None:
    method: Any = get_selector("streaming")
    for n, ratio, window, beta, *counts in load("kvpress_pyramidkv_budgets.npz")["table"].tolist():
        n, keep = int(n), 1 - ratio
        shares = PyramidBudgets(beta, int(window), "exact")
        contexts = [context(method, n, round(n * keep), layer=i, layers=8, keep_ratio=keep) for i in range(8)]
        assert shares.share(contexts) == counts, (n, ratio, window, beta)


@pytest.mark.parametrize("name", names("kvpress_pyramidkv_layer*", 2))
def test_pyramidkv_of_kvpress(name: str) -> None:
    golden = load(name)
    window, n, keep = golden["window"], golden["keys"].shape[2], 1 - golden["compression_ratio"]
    queries = torch.nn.functional.pad(golden["queries_window"], (0, 0, n - window, 0))
    budgets = {"name": "pyramid", "beta": golden["beta"], "variant": "exact"}
    method: Any = get_selector("snapkv", scope="all", window=window, kernel=golden["kernel_size"], budgets=budgets)
    layers, layer = golden["n_layers"], golden["layer_idx"]
    facts = [{"layer": i, "layers": layers, "keep_ratio": keep} for i in range(layers)]
    contexts = [read(method, observed(queries, golden["keys"]), round(n * keep), **own) for own in facts]
    ctx = contexts[layer]
    torch.testing.assert_close(ctx[WindowAttention], golden["scores"][0], rtol=1e-4, atol=1e-5)
    ctx.budget = method.share(contexts)[layer]
    assert torch.equal(method.evict(ctx).keep, golden["kept_positions_sorted"][0])


def test_h2o() -> None:
    golden = load("kvfactory_h2o_01.npz")
    method: Any = get_selector("h2o", scope="all", recent=golden["window"])
    ctx = read(method, observed(golden["queries"], golden["keys"]), golden["capacity"])
    assert torch.equal(method.evict(ctx).keep, golden["kept_positions_sorted"][0])


@pytest.mark.parametrize("name", ["kvfactory_streaming_01.npz", "kvpress_streamingllm_01.npz"])
def test_streaming(name: str) -> None:
    golden = load(name)
    n, kept = golden["keys"].shape[2], golden["kept_positions_sorted"][0]
    sinks = golden["n_sink"] if "n_sink" in golden else golden["capacity"] - golden["window"]
    method: Any = get_selector("streaming", scope="all", sinks=sinks)
    assert torch.equal(method.evict(context(method, n, kept.shape[1])).keep.expand(len(kept), -1), kept)


def test_the_other_baseline_of_elastic_cache_is_streaming() -> None:
    golden = load("elastic_repo_local.npz")
    method: Any = get_selector("streaming", scope="all", sinks=golden["start_size"])
    kept = golden["kept_prefill"]
    assert torch.equal(method.evict(context(method, golden["n"], len(kept))).keep[0], kept)


@pytest.mark.parametrize("name", names("prefixkv_profiles_*", 2))
def test_released_profiles_are_layer_budgets(name: str) -> None:
    golden = load(name)
    for drop, profile in zip(golden["drop_ratio"].tolist(), golden["profile"].tolist(), strict=True):
        method: Any = get_selector("prefixkv", scope="all", budgets=[1 - share for share in profile])
        depth = len(profile)
        method.layer_budgets.check(depth, 1 - drop)
        counts = {
            n: method.share([context(method, n, n, layer=i, layers=depth) for i in range(depth)]) for n in (9, 64)
        }
        assert min(counts[9]) >= 3, "as much as their code needs to run"
        assert counts[64] == [max(3, 64 - round(share * 64)) for share in profile]


@pytest.mark.parametrize("name", names("prefixkv_cdf_*", 3))
def test_lengths_of_prefixes(name: str) -> None:
    golden = load(name)
    drops = cumulative_drops(list(golden["score_sum"]), golden["target_num"], golden["protect"])
    assert drops == golden["forget_counts"].tolist()


@pytest.mark.parametrize("name", names("prefixkv_prefill_*", 3))
def test_prefixkv(name: str) -> None:
    golden = load(name)
    start, kept = golden["start_size"], padded(golden["kept_indices"][:, 0])
    method: Any = get_selector("prefixkv", scope="all", start=start)
    n, depth = golden["attn"].shape[-1], len(kept)
    sums = golden["attn"].sum(dim=3)[:, 0]
    budget = n - round(n * golden["ratio"])
    contexts = [context(method, n, budget, {AttentionSums(): own}, layer=i, layers=depth) for i, own in enumerate(sums)]
    counts = method.share(contexts)
    assert [1 - count / n for count in counts] == pytest.approx(golden["ratios_per_layer"].tolist())
    for ctx, count, theirs in zip(contexts, counts, kept, strict=True):
        ctx.budget = count
        assert method.evict(ctx).keep[0].tolist() == theirs


@pytest.mark.parametrize("name", names("prefixkv_released_*", 3))
def test_prefixkv_with_a_profile(name: str) -> None:
    golden = load(name)
    kept, n = padded(golden["kept_indices"]), golden["n_prompt"]
    shares = tuple(1 - ratio for ratio in golden["ratios_per_layer"].tolist())
    method: Any = get_selector("prefixkv", scope="all", start=golden["start_size"], budgets=shares)
    contexts = [context(method, n, n, {AttentionSums(): own[None]}) for own in golden["score_sum"]]
    for ctx, count, theirs in zip(contexts, method.share(contexts), kept, strict=True):
        ctx.budget = count
        assert method.evict(ctx).keep[0].tolist() == theirs


@pytest.mark.parametrize("name", names("elastic_prefill_*", 2))
def test_elastic_cache_as_released(name: str) -> None:
    golden = load(name)
    n = golden["attn"].shape[-1]
    method: Any = get_selector("elastic-cache", scope="all", start=golden["start_size"], variant="released")
    sums = golden["attn"].sum(dim=3)[:, 0]
    torch.testing.assert_close(sums.mean(dim=1), golden["score_sum"], rtol=1e-4, atol=1e-5)
    for layer, scores in enumerate(sums):
        answer = method.evict(context(method, n, n - golden["forget_num"], {AttentionSums(): scores}))
        assert answer.k == golden["out_len"][layer]
        for ours, theirs in (("keys", "out_keys"), ("values", "out_values")):
            merged = answer.merge(golden[ours][layer, 0])
            torch.testing.assert_close(merged, golden[theirs][layer, 0], rtol=1e-4, atol=1e-5)
        # A slot of a short prompt is counted from the end.
        stored = answer.k + 20
        slot = method.leaving(DecodingState(layer, stored, answer.k, n + 20, n)).place
        assert (slot if golden["decode_drop_slot"] >= 0 else slot - stored) == golden["decode_drop_slot"]


def test_elastic_cache_as_released_counts_from_what_was_asked() -> None:
    """Of 40 entries 20 were asked for and 19 stayed, but the next leaves when there are more than half of all seen."""
    method: Any = get_selector("elastic-cache", scope="all", variant="released")
    counts = [method.leaving(DecodingState(0, 19 + step, 19, 40 + step, 40)).count for step in range(1, 6)]
    assert counts == [int(19 + step - (40 + step) * 0.5 >= 1) for step in range(1, 6)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", names("squeeze_*", 3))
def test_squeeze_attention(name: str) -> None:
    golden = load(name)
    cosines, n = golden["mean_cosine"], golden["prompt_len"]
    assert smallest_split(cosines.tolist(), 3) == golden["group"].tolist()
    method: Any = get_selector("streaming", scope="all")
    signals = [{ResidualCosine(): cosine} for cosine in cosines]
    contexts = [context(method, n, round(n * golden["ini_ratio"]), own) for own in signals]
    counts = SqueezeBudgets(golden["class3_ratio"]).share(contexts)
    if golden["class12_ratio"] > 1:  # the authors' would keep more than there is
        total = sum(ctx.budget for ctx in contexts)
        assert total - len(counts) < sum(counts) <= total, "rounded down layer by layer"
        assert all(count == n for count, group in zip(counts, golden["group"], strict=True) if group < 2)
    else:
        assert counts == golden["budget_tokens"].tolist()


def decoded(method: Any, kept: list[int], n: int, steps: int, layer: int = 0) -> list[list[int]]:
    """Entries of a layer after each step, by the method's rule."""
    entries, found = list(kept), []
    for step in range(1, steps + 1):
        entries.append(n + step - 1)
        leaving = method.leaving(DecodingState(layer, len(entries), len(kept), n + step, n))
        del entries[leaving.place : leaving.place + leaving.count]
        found.append(list(entries))
    return found


@pytest.mark.parametrize("name", names("prefixkv_prefill_*", 3))
def test_prefixkv_while_decoding(name: str) -> None:
    golden = load(name)
    method: Any = get_selector("prefixkv", scope="all")
    n, theirs = golden["attn"].shape[-1], golden["kept_after_decode_steps"][:, :, 0]
    for layer, kept in enumerate(padded(golden["kept_indices"][:, 0])):
        assert decoded(method, kept, n, len(theirs)) == padded(theirs[:, layer])


@pytest.mark.parametrize("name", names("prefixkv_released_*", 3))
def test_prefixkv_while_decoding_with_a_profile(name: str) -> None:
    golden = load(name)
    shares = tuple(1 - ratio for ratio in golden["ratios_per_layer"].tolist())
    method: Any = get_selector("prefixkv", scope="all", budgets=shares)
    lengths, last = golden["kept_len_per_decode_step"], padded(golden["kept_after_40_steps"])
    slots = golden["decode_drop_slot"].tolist()
    for layer, kept in enumerate(padded(golden["kept_indices"])):
        n = golden["n_prompt"]
        assert method.leaving(DecodingState(layer, len(kept) + 9, len(kept), n + 1, n)).place == slots[layer]
        steps = decoded(method, kept, n, len(lengths), layer)
        assert [len(own) for own in steps] == lengths[:, layer].tolist()
        assert steps[-1] == last[layer]


@pytest.mark.parametrize("name", names("gemfilter_*", 5))
def test_gemfilter(name: str) -> None:
    golden = load(name)
    n, heads = golden["keys"].shape[2], golden["query_last"].shape[1]
    queries = torch.zeros(1, heads, n, golden["keys"].shape[3])
    queries[:, :, -1] = golden["query_last"]
    raw = observed(queries, golden["keys"])
    plain = LastQueryLogits(kernel=1).compute(raw)[0]
    torch.testing.assert_close(plain, golden["summed_scores"], rtol=1e-4, atol=1e-4)
    pooled = LastQueryLogits(kernel=golden["kernel_size"]).compute(raw)[0]
    torch.testing.assert_close(pooled, golden["pooled_scores"], rtol=1e-4, atol=1e-4)
    kept = topk_indices(pooled, golden["topk"])
    theirs = golden["pooled_scores"][golden["indices_by_score"]]
    torch.testing.assert_close(pooled[kept].sort(descending=True).values, theirs, rtol=1e-4, atol=1e-4)
    if "ties" not in name:
        assert torch.equal(kept, golden["kept_ascending"])


def test_chunkkv() -> None:
    golden = load("kvpress_chunkkv_01.npz")
    window, n = golden["window"], golden["keys"].shape[2]
    queries = torch.nn.functional.pad(golden["queries_window"], (0, 0, n - window, 0))
    method: Any = get_selector(
        "chunkkv", scope="all", window=window, kernel=golden["kernel_size"], length=golden["chunk_length"]
    )
    ctx = read(method, observed(queries, golden["keys"]), int(n * (1 - golden["compression_ratio"])))
    torch.testing.assert_close(ctx[WindowAttention], golden["scores"][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(method.evict(ctx).keep.expand(2, -1), golden["kept_positions_sorted"][0])


def test_laziness_of_a_layer() -> None:
    golden = load("kvpress_simlayerkv_01.npz")
    n = golden["keys"].shape[2]
    queries = torch.nn.functional.pad(golden["queries_window"], (0, 0, n - 1, 0))
    signal = LocalAttention(golden["n_initial"], golden["n_recent"])
    share = signal.compute(observed(queries, golden["keys"]))
    assert share.item() == pytest.approx(golden["lazy_score"], rel=1e-4)
    assert bool(share > golden["lazy_threshold"]) == golden["is_lazy"]


@pytest.mark.parametrize("name", names("defensivekv_*", 1))
def test_defensivekv(name: str) -> None:
    """The scores; here each head keeps equally many, where the authors keep the best of all heads of a layer."""
    golden = load(name)
    window, n, heads = golden["window"], golden["keys"].shape[2], golden["keys"].shape[1]
    queries = torch.nn.functional.pad(golden["queries_window"], (0, 0, n - window, 0))
    raw = observed(queries, golden["keys"], golden["values"])
    method: Any = get_selector("defensivekv", scope="all", window=window, kernel=golden["kernel_size"])
    worst, uncovered, norms = method.reads()
    call = called(raw, golden["o_proj_weight"])
    signals = {signal: signal.present(signal.compute(raw)[0]) for signal in (worst, uncovered)}
    signals[norms] = norms.present(norms.compute(call)[0])
    budget = int(n * (1 - golden["compression_ratio"]))
    ctx = context(method, n, budget, signals, heads=heads)
    ours, theirs = method.score(ctx), golden["flat_scores"].view(heads, n)
    forced = theirs == theirs.max()
    assert torch.equal(ours == ours.max(), forced), "the window, and what covers the attention"
    torch.testing.assert_close(ours[~forced], theirs[~forced], rtol=1e-4, atol=1e-5)
    flat = topk_indices(ours.flatten(), golden["layer_budget"])
    assert torch.equal(flat, golden["kept_flat_sorted"][0])
    assert torch.bincount(flat // n, minlength=heads).tolist() == golden["kept_per_head"].tolist()
    assert method.evict(ctx).keep.shape == (heads, budget)


@pytest.mark.parametrize("name", names("triattention_*", 1))
def test_triattention(name: str) -> None:
    golden = load(name)
    omega = golden["omega"].double()
    mean = torch.complex(golden["q_mean_real"], golden["q_mean_imag"])
    pairs = torch.complex(*golden["k_unrotated"].unflatten(-1, (2, -1)).unbind(dim=-2))
    turned = pairs * torch.polar(torch.ones(1, dtype=torch.float64), golden["key_positions"][:, None] * omega)
    keys = torch.cat([turned.real, turned.imag], dim=-1).float()
    angles = (golden["round_start"] + golden["offsets"].double())[:, None] * omega
    rotations = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    how = "mean" if golden["aggregation_is_mean"] else "max"
    ours = future_scores(keys, mean, golden["q_abs_mean"], rotations, how)
    torch.testing.assert_close(ours, golden["scores"], rtol=1e-4, atol=1e-3)
