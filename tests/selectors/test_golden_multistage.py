"""AIM, VFlowOpt, ToDRE and ATP against the authors' functions, or a second reading; see tests/golden/README.md.

Where a file tests a whole selection it goes through `select` or the selector; where it tests a part, through the public
kernel. Files about ties and NaN are checked by the properties that must hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.selectors.test_golden import GOLDEN, load
from vtc import kernels
from vtc.core.context import VisualContext
from vtc.core.observations import TokenGrids
from vtc.core.selection import Selection
from vtc.core.sites import BeforeDecoder, DecoderLayer
from vtc.core.stage import ModelShape
from vtc.functional import select
from vtc.kernels import reference
from vtc.registry import get_selector
from vtc.selectors import AimSelector
from vtc.selectors.aim import PageRank, retained
from vtc.selectors.learned.atp import redundancy_score, soft_mask, spatial_score
from vtc.selectors.todre import AttentionExchange
from vtc.selectors.vflowopt import PRESETS, ContextRelevance, PixelEntropy, VFlowOptSelector


def names(prefix: str, *, without: tuple[str, ...] = ()) -> list[str]:
    found = sorted(path.name for path in GOLDEN.glob(f"{prefix}_*.npz"))
    return [name for name in found if not any(word in name for word in without)]


def close(actual: Tensor, expected: Tensor) -> None:
    half = expected.dtype == torch.float16
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=1e-4, atol=2e-3 if half else 1e-5, check_dtype=False
    )


def test_all_files_are_there() -> None:
    counts = {prefix: len(names(prefix)) for prefix in ("aim", "atp", "todre", "vflowopt")}
    least = {"aim": 28, "atp": 2, "todre": 10, "vflowopt": 18}
    assert all(counts[prefix] >= least[prefix] for prefix in least), counts


# --- aim -------------------------------------------------------------------------------------------------------------


def merge_rounds(golden: dict[str, Any], order: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per round: the averaging weights (B, K, N), the merged tokens and the merged metric."""
    metric = golden["metric"].float()
    x = golden.get("x", metric).float()
    rounds = []
    for r in golden["rs"].tolist():
        anchors, assign = kernels.bipartite_merge(metric, r, order=order)
        weights = torch.zeros(metric.shape[0], anchors.shape[1], metric.shape[1]).scatter(1, assign[:, None], 1.0)
        weights /= weights.sum(dim=-1, keepdim=True)
        x, metric = weights @ x, weights @ metric
        rounds.append((weights, x, metric))
    return rounds


@pytest.mark.parametrize("name", names("aim_merge", without=("nan", "none")))
def test_aim_merge(name: str) -> None:
    # Ties included: duplicates have equal partners, so the averages agree whichever of them is taken.
    golden = load(name)
    for round_, (weights, out, metric) in enumerate(merge_rounds(golden, "author"), start=1):
        close(out, golden[f"out_{round_}"])
        if f"weights_{round_}" in golden and "ties" not in name:
            close(weights, golden[f"weights_{round_}"])
        if f"metric_out_{round_}" in golden:
            close(metric, golden[f"metric_out_{round_}"])
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


@pytest.mark.parametrize("name", names("aim_merge", without=("nan", "none")))
def test_aim_merge_in_original_order_has_the_same_slots(name: str) -> None:
    golden = load(name)
    metric, r = golden["metric"], int(golden["rs"][0])
    theirs, their_slot = kernels.bipartite_merge(metric, r, order="author")
    ours, our_slot = kernels.bipartite_merge(metric, r)
    assert torch.equal(ours, theirs.sort(dim=1).values)
    assert torch.equal(ours.gather(1, our_slot), theirs.gather(1, their_slot))


@pytest.mark.parametrize("name", [name for name in names("aim_merge") if "none" in name])
def test_aim_merge_nothing_to_merge(name: str) -> None:
    golden = load(name)  # the released function returns None here, and its caller fails
    assert golden["is_none_1"]
    anchors, assign = kernels.bipartite_merge(golden["metric"], int(golden["rs"][0]))
    assert anchors.tolist() == assign.tolist() == [list(range(golden["metric"].shape[1]))]


def test_aim_merge_zero_vector_is_like_nothing() -> None:
    golden = load("aim_merge_10_zero_source_vector_nan_n10_r3.npz")
    ((weights, out, _),) = merge_rounds(golden, "author")
    assert bool(torch.isfinite(out).all())
    assert weights.shape == golden["weights_1"].shape
    assert float(weights[0, :, 4].max()) == 1.0, (
        "the released code merges the zero vector first, because NaN sorts first"
    )


@pytest.mark.parametrize("name", ["aim_merge_06_video_b4_n196_d16_r98_r49.npz"])
def test_aim_merges_a_video_frame_by_frame(name: str) -> None:
    golden = load(name)
    frames, n, _ = golden["metric"].shape
    selection = select("aim", features=golden["metric"].flatten(0, 1), grid_thw=(frames, 14, n // 14), keep_ratio=0.25)
    close(selection.merge(golden["metric"].flatten(0, 1)), golden["out_2"].flatten(0, 1))


def test_aim_merges_an_image_by_its_keys() -> None:
    golden = load("aim_merge_13_image_n576_metric16_x8_r288_r36.npz")
    x, keys = golden["x"][0], golden["metric"][0]
    selection = select("aim", features=x, keys=keys, metric="keys", grid_thw=(1, 24, 24), keep_ratio=0.4375)
    assert selection.k == 252
    theirs = golden["out_2"][0]
    # Theirs has the 252 merged tokens in the order of the last round, ours in that of the image.
    match = torch.cdist(selection.merge(x), theirs).argmin(dim=1)
    assert len(set(match.tolist())) == 252
    close(selection.merge(x), theirs[match])


@pytest.mark.parametrize("name", names("aim_importance", without=("leftpad",)))
def test_aim_importance(name: str) -> None:
    golden = load(name)
    logits = golden["logits"]
    walk = {"temperature": golden["tau"], "iterations": golden["iters"], "damping": golden["d"]}
    close(reference.pagerank_of_logits(logits, **walk), golden["importance"])
    # With the rows of the unit matrix for keys, queries are logits.
    seen = logits > torch.finfo(torch.float32).min / 2
    keys = torch.eye(logits.shape[-1], dtype=logits.dtype).expand(len(logits), 1, -1, -1)
    streamed = kernels.pagerank(logits.masked_fill(~seen, 0.0), keys, 1.0, seen, seen.any(dim=-1).all(dim=1), **walk)
    close(streamed, golden["importance"])


def test_aim_importance_of_padding_is_nothing() -> None:
    golden = load("aim_importance_10_leftpad_full_masked_rows_n8.npz")
    assert bool(golden["importance"].isnan().all())
    logits = golden["logits"]
    real = (logits > -1e30).any(-1)[0, 0]
    importance = reference.pagerank_of_logits(logits, golden["tau"], golden["iters"], golden["d"])
    assert torch.equal(importance[0, ~real], torch.zeros(int((~real).sum())))
    alone = logits[:, :, real][..., real]
    torch.testing.assert_close(
        importance[:, real], reference.pagerank_of_logits(alone, golden["tau"], golden["iters"], golden["d"])
    )


def test_aim_schedule() -> None:
    golden = load("aim_schedule.npz")
    for depth, expected in ((28, golden["qwen2_28_layers"]), (32, golden["llama_32_layers"])):
        selector = AimSelector().resolve(ModelShape(depth), 0.25)
        assert [selector.rate(layer) for layer in range(depth)] == pytest.approx(expected.tolist())
        inside = selector.stages(ModelShape(depth), 0.25)[1:]
        first = int((expected < 1).nonzero()[0])
        assert [stage.site for stage in inside] == [DecoderLayer(layer) for layer in range(first + 1, first + 9)]
        left = torch.tensor([stage.keep for stage in inside]).cumprod(0)
        torch.testing.assert_close(left, torch.arange(7, -1, -1) / 8)


@dataclasses.dataclass
class Pruned:
    """The authors' masks of one row and layer, cut to the visual tokens."""

    importance: Tensor
    before: Tensor
    after: Tensor


def pruned(golden: dict[str, Any], row: int, layer: int) -> Pruned:
    start, stop = golden["boundaries"][row, :2].tolist()
    masks = torch.cat([golden["attention_mask_in"][None], golden["mask_after_layer"]])
    part = slice(start, stop)
    return Pruned(
        golden["importance_per_layer"][layer, row, part], masks[layer, row, part], masks[layer + 1, row, part]
    )


@pytest.mark.parametrize("name", names("aim_prune"))
def test_aim_prune(name: str) -> None:
    golden = load(name)
    rates = golden["retain_rate"].tolist()
    visual = golden["boundaries"][:, 1] - golden["boundaries"][:, 0]
    released = rates == [AimSelector().resolve(ModelShape(28), 0.25).rate(layer) for layer in range(len(rates))]
    mask = golden["attention_mask_in"]
    for layer, rate in enumerate(rates):
        logits = masked(golden["base_logits"][layer], mask)
        importance = reference.pagerank_of_logits(logits)
        mask = golden["mask_after_layer"][layer]
        for row in range(len(visual)):
            authors = pruned(golden, row, layer)
            start, stop = golden["boundaries"][row, :2].tolist()
            if bool(golden["attention_mask_in"][row].all()):  # their importance of a padded row contains NaN or padding
                close(importance[row, start:stop][authors.before], authors.importance[authors.before])
            if row == 0:  # they count by the first row
                count = retained(int(visual[row]), rate)
                assert count == int(authors.after.sum())
            else:
                count = int(authors.after.sum())
            ours = pick(authors, count, rate, layer, int(visual[row]), released and row == 0)
            if "ties" in name:
                scores = authors.importance[authors.before]
                close(scores[ours.keep].sort().values, authors.importance[authors.after].sort().values)
            else:
                expected = authors.after[authors.before].nonzero()[:, 0]
                assert torch.equal(ours.keep, expected), (layer, row)


def masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, H, N, N) with causality and the tokens that `mask` (B, N) hides."""
    n = logits.shape[-1]
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & mask[:, None, None]
    return logits.masked_fill(~allowed, torch.finfo(torch.float32).min)


def pick(authors: Pruned, count: int, rate: float, layer: int, entered: int, released: bool) -> Selection:
    """Our choice behind `layer`: by the selector where the schedule is the released one, else by its ranking."""
    scores = authors.importance[authors.before]
    if not released or not 0 < rate < 1:
        return Selection(len(scores), kernels.topk_indices(scores, count))
    context = VisualContext(
        features=torch.empty(len(scores), 0),
        budget=count,
        generator=torch.Generator(),
        grids=((1, 1, len(scores)),),
        site=DecoderLayer(layer + 1),
        tokens_at_input=entered,
        signals={PageRank(): scores},
    )
    return AimSelector().resolve(ModelShape(28), 0.25).select(context)


# --- vflowopt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("vflowopt_entropy", without=("signed",)))
def test_vflowopt_entropy(name: str) -> None:
    golden = load(name)
    patches = torch.nn.functional.unfold(golden["pixel_values"], 14, stride=14).transpose(1, 2).unflatten(2, (3, -1))
    close(kernels.patch_entropy(patches), golden["entropy"].flatten(1))


def test_vflowopt_entropy_of_normalised_pixels_is_that_of_the_picture() -> None:
    levels = torch.randint(0, 256, (5, 3, 196), generator=torch.Generator().manual_seed(0))
    half = torch.full((3,), 0.5)
    normalised = (levels / 255 - 0.5) / 0.5
    grey = (levels * 0.3333).sum(1).round()
    expected = []
    for patch in grey:
        share = patch.unique(return_counts=True)[1] / 196
        expected.append(-(share * share.log2()).sum())
    torch.testing.assert_close(kernels.patch_entropy(normalised, half, half), torch.stack(expected))


@pytest.mark.parametrize("name", names("vflowopt_importance", without=("nan",)))
def test_vflowopt_importance(name: str) -> None:
    golden = load(name)
    entropy = golden["entropy"].flatten(1).softmax(-1)
    for image, attention in enumerate(golden["attn"].mean(1)):
        relevance = reference.context_relevance_of(attention, golden["t"])
        member = attention.mean(0) > golden["t"] * attention.mean()
        assert torch.equal(member, golden["context_mask"][image])
        context = VisualContext(
            features=torch.empty(len(relevance), 0),
            budget=1,
            generator=torch.Generator(),
            grids=((1, 1, len(relevance)),),
            signals={ContextRelevance(): relevance, PixelEntropy(): entropy[image]},
        )
        score = VFlowOptSelector(alpha=golden["alpha"], variant="released").score(context)
        close(score, golden["importance"][image])
        # The paper adds where the code averages.
        summed = reference.context_relevance_of(attention, golden["t"], reduction="sum")
        torch.testing.assert_close(summed, relevance * member.sum())


def test_vflowopt_empty_context_is_everybody() -> None:
    golden = load("vflowopt_importance_04_t_too_large_empty_context_nan.npz")
    assert bool(golden["importance"].isnan().all())
    assert not bool(golden["context_mask"].any())
    attention = golden["attn"].mean(1)
    close(reference.context_relevance_of(attention, golden["t"]), attention.mean(dim=1))


def without_newlines(golden: dict[str, Any]) -> tuple[Tensor, list[tuple[int, int, int]], int]:
    """(n,) bool, the patches among the tokens of thumbnail and tiles; the two grids; the number of newlines."""
    base, width = golden["base_grid"], golden["local_w"]
    rows = (len(golden["scores"]) - base**2) // width
    newline = torch.zeros(rows, width, dtype=torch.bool)
    newline[:, -1] = True
    patch = torch.cat([torch.ones(base**2, dtype=torch.bool), ~newline.flatten()])
    return patch, [(1, base, base), (1, rows, width - 1)], rows


@pytest.mark.parametrize("name", names("vflowopt_recycle"))
def test_vflowopt_recycle(name: str) -> None:
    golden = load(name)
    scores, features = golden["scores"], golden["features"]
    patch, grids, newlines = without_newlines(golden)
    assert bool((scores[~patch] == 1).all())
    assert bool(golden["kept_mask"][~patch].all())
    selection = select(
        "vflowopt",
        context_relevance=scores[patch],
        grid_thw=grids,
        structural=newlines,
        keep_ratio=golden["retain_ratio"],
        cell=golden["cell"],
        variant="released",
    )
    expected = golden["kept_mask"][patch]
    assert selection.k + newlines == len(scores) - golden["reduce_tokens"] - golden["num_merged"] + cells_of(golden)
    if "ties" in name:  # which of equal tokens is recycled decides which of a cell is the best
        cutoff = scores[golden["kept_without_merge_mask"]].min()
        assert bool((scores[patch][~selection.mask] <= cutoff).all())
        assert bool(selection.mask[scores[patch] > cutoff].all())
        return
    for theirs in golden["group_id"].unique():
        cell = golden["groups"][golden["group_id"] == theirs]
        ours = torch.full((len(scores),), -1)
        ours[patch] = selection.assign
        assert len(ours[cell].unique()) == 1, "the tokens of a cell become one"
    assert torch.equal(selection.keep, expected.nonzero()[:, 0])
    out = torch.empty(len(scores), features.shape[1])
    out[~patch] = features[~patch]
    merged = out[patch]
    merged[selection.keep] = selection.merge(features[patch])
    out[patch] = merged
    close(out[golden["kept_mask"]], golden["out_features"])
    close(scores[golden["kept_mask"]], golden["out_scores"])


def cells_of(golden: dict[str, Any]) -> int:
    """Cells that the authors' low tokens lie in."""
    base, edge = golden["base_grid"], golden["cell"]
    cells = set()
    for index in golden["low_k"].tolist():
        tile = index >= base**2
        width = golden["local_w"] if tile else base
        row, column = divmod(index - base**2 if tile else index, width)
        cells.add((tile, int(row / edge), int(column / edge)))
    return len(cells)


@pytest.mark.parametrize("name", names("vflowopt_video_topk"))
def test_vflowopt_video(name: str) -> None:
    golden = load(name)
    frames, n = golden["scores"].shape
    side = round(n**0.5)
    selection = select(
        "vflowopt",
        context_relevance=golden["scores"].flatten(),
        grid_thw=(frames, side, side),
        structural=1,
        keep_ratio=golden["retain_ratio"],
        variant="released",
    )
    expected = golden["kept_mask"]
    assert bool(expected[-1])
    if "ties" in name:
        scores = golden["scores"].flatten()
        close(scores[selection.keep].sort().values, scores[expected[:-1]].sort().values)
    else:
        assert torch.equal(selection.keep, expected[:-1].nonzero()[:, 0])
        close(selection.merge(golden["features"].flatten(0, 1)), golden["out_features"][:-1])
        close(golden["scores"].flatten()[selection.keep], golden["out_scores"][:-1])
    assert torch.equal(golden["out_features"][-1], golden["newline"][0])


@pytest.mark.parametrize("name", names("vflowopt_llm_stage"))
def test_vflowopt_inside(name: str) -> None:
    golden = load(name)
    scores, start = golden["scores"], golden["image_start"]
    left = torch.arange(len(scores))
    for stage, ratio in enumerate(golden["stage_retain"].tolist(), start=1):
        context = VisualContext(
            features=torch.empty(len(left), 0),
            budget=round(len(left) * ratio),
            generator=torch.Generator(),
            grids=((1, 1, len(left)),),
            site=DecoderLayer(9 * stage),
            keep_ratio=ratio,
            signals={ContextRelevance(): scores[left]},
        )
        left = left[get_selector("vflowopt", variant="released").select(context).keep]
        text = golden["seq_len"] - len(scores)
        theirs = golden[f"kept_original_index_stage_{stage}"]
        assert len(left) + text == len(theirs) == int(golden[f"mask_stage_{stage}"].sum())
        kept = theirs[(theirs >= start) & (theirs < start + len(scores))] - start
        if "ties" in name:
            close(scores[left].sort().values, scores[kept].sort().values)
        else:
            assert torch.equal(left, kept)


@pytest.mark.parametrize("budget", sorted(PRESETS))
def test_vflowopt_released_settings_average_to_their_budget(budget: float) -> None:
    preset = PRESETS[budget]
    average = (9 * preset.r1 + 9 * preset.r1 * preset.r2 + 10 * preset.r1 * preset.r2 * preset.r3) / 28
    assert average == pytest.approx(budget, abs=1e-3)
    for variant, tolerance in (("released", 1e-3), ("paper", 1e-9)):
        stages = (
            get_selector("vflowopt", variant=variant).resolve(ModelShape(28), budget).stages(ModelShape(28), budget)
        )
        sites = [stage.site for stage in stages]
        layers = [9, 18] if preset.r2 < 1 else [18]
        assert sites == [BeforeDecoder(), *map(DecoderLayer, layers)]
        left, mean = 1.0, 0.0
        for stage, begin, end in zip(stages, [0, *layers], [*layers, 28], strict=True):
            assert stage.keep is not None
            left *= stage.keep
            mean += left * (end - begin) / 28
        assert mean == pytest.approx(budget, abs=tolerance)


# --- todre -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("todre_stage1"))
def test_todre_diversity(name: str) -> None:
    golden = load(name)
    x, k, pivot = golden["x"], golden["k"], golden["pivot"]
    picks = kernels.max_sum(x, k, pivot)
    if "duplicates" in name:
        # Copies of one row are as good as each other; which of them is taken is rounding.
        close(x[picks], x[golden["selected_in_order_maxsum"]])
    else:
        assert torch.equal(picks, golden["selected_in_order_maxsum"])
        assert torch.equal(kernels.farthest_point(x, k, pivot), golden["selected_in_order_maxmin_variant"])
    assert len(set(picks.tolist())) == k
    if golden["cls_attention"].numel():
        rows = golden["cls_attention"].expand(1, 2, -1)
        for diversity, order in (("sum", "maxsum"), ("min", "maxmin_variant")):
            selection = select("todre", features=x, cls_attention=rows, keep_tokens=k, diversity=diversity)
            assert torch.equal(selection.keep, golden[f"selected_in_order_{order}"].sort().values)


@pytest.mark.parametrize("name", names("todre_stage2"))
def test_todre_exit(name: str) -> None:
    golden = load(name)
    exchange = reference.attention_exchange(golden["attn"], golden["text_index"], golden["visual_index"])
    expected = torch.tensor([golden["text_to_vision"], golden["vision_to_text"]])
    close(exchange, expected)
    context = VisualContext(
        features=torch.empty(16, 0),
        budget=16,
        generator=torch.Generator(),
        grids=((1, 4, 4),),
        site=DecoderLayer(28),
        signals={AttentionExchange(): exchange},
    )
    assert get_selector("todre").select(context).k == (0 if bool((expected < 0.1).all()) else 16)


# --- atp -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("atp_equations"))
def test_atp_equations(name: str) -> None:
    golden = load(name)
    visual, text = golden["vision_index"], golden["text_index"]
    side = round(len(visual) ** 0.5)
    origin = TokenGrids(((1, side, side),)).origin()
    spatial = spatial_score(origin, golden["stride"], golden["lambda_sample"])
    close(spatial, golden["s_spatial"])
    assert torch.equal(spatial != 0, golden["sampled_mask"].bool())
    assert golden["sampling_rate"] == pytest.approx(golden["stride"] ** -2)
    for row, attention in enumerate(golden["attn"].mean(1)):
        s_self, s_cross = attention[visual][:, visual].mean(0), attention[text][:, visual].mean(0)
        close(s_self, golden["s_self"][row])
        close(s_cross, golden["s_cross"][row])
        redundancy = redundancy_score(s_self, s_cross)
        close(redundancy, golden["s_redundant"][row])
        theta_r, theta_s = golden["theta_r"][row], golden["theta_s"][row]
        never = torch.tensor(torch.inf)
        for kind, thetas in (
            ("", (theta_r, theta_s)),
            ("_redundant", (theta_r, never)),
            ("_spatial", (never, theta_s)),
        ):
            close(soft_mask(redundancy, spatial, *thetas, golden["temperature"]), golden[f"soft_mask{kind}"][row])
        selection = select(
            "atp",
            modality_attention=torch.stack([s_cross, s_self]),
            grid_thw=(1, side, side),
            keep_tokens=len(visual),
            theta_r=float(theta_r),
            theta_s=float(theta_s),
            stride=golden["stride"],
            lambda_sample=golden["lambda_sample"],
            scale="none",
        )
        assert torch.equal(selection.mask, golden["hard_keep"][row])
