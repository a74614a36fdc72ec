"""Methods whose tokens leave before or inside the vision tower."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from tests import tiny
from tests.invariants.matrix import build
from vtc.core.observations import PatchPixels, VisionAttention
from vtc.selectors.adaptive_sparse_vit import AdaptiveSparseVitSelector, HeadWeightedAttention, HeadWeightedReceived
from vtc.selectors.flowcut import FlowCutSelector, InformationFlow, ReceivedFlow, dropped
from vtc.selectors.pixelprune import BlockPixels
from vtc.selectors.vscan import VScanSelector, best_of_windows

# --- PixelPrune ------------------------------------------------------------------------------------------------------


def blocks(*rows: str) -> torch.Tensor:
    """(N, 2) pixels of blocks: a letter is a value, 0.1 apart."""
    letters = torch.tensor([ord(letter) - ord("a") for row in rows for letter in row])
    return 0.1 * letters[:, None].expand(-1, 2).float()


def pixelprune(pixels: torch.Tensor, grid: tuple[int, int, int], **options: Any) -> list[int]:
    budget = options.pop("keep_tokens", 10**6)
    return vtc.select("pixelprune", block_pixels=pixels, grid_thw=grid, keep_tokens=budget, **options).keep.tolist()


def test_pixelprune_follows_edges() -> None:
    # Row 0 from the left, column 0 from above; a vertical edge from above, everything else from the left.
    drawn = blocks("aab", "aab", "bbb")
    assert pixelprune(drawn, (1, 3, 3)) == [0, 2, 6]
    # The corner is like the left and not like the upper block: from above, so the upper "b" goes on.
    assert pixelprune(blocks("ab", "ab"), (1, 2, 2)) == [0, 1]
    # The corner is like both: from the left.
    assert pixelprune(blocks("aa", "ab"), (1, 2, 2)) == [0, 3]


def test_pixelprune_of_equal_blocks_keeps_one() -> None:
    assert pixelprune(blocks("aaaa", "aaaa"), (1, 2, 4)) == [0]
    assert pixelprune(blocks("aaaa"), (4, 1, 1), over="time") == [0, 1, 2, 3]  # one a frame
    assert pixelprune(blocks("aaaa", "aaaa"), (2, 1, 4)) == [0, 4]


def test_pixelprune_anchored_errors_do_not_add_up() -> None:
    slope = blocks("abcdefgh")
    assert pixelprune(slope, (1, 1, 8), tau=0.15) == [0, 2, 4, 6]
    assert pixelprune(slope, (1, 1, 8), tau=0.15, anchored=False) == [0]
    assert pixelprune(slope, (8, 1, 1), tau=0.15, over="time") == list(range(8))  # the one block of a frame stays
    busy = torch.stack([slope, blocks("azazazaz")], dim=1).flatten(0, 1)
    assert pixelprune(busy, (8, 1, 2), tau=0.15, over="time") == sorted([0, 4, 8, 12, *range(1, 16, 2)])
    assert pixelprune(busy, (8, 1, 2), tau=0.15, over="time", anchored=False) == [0, *range(1, 16, 2)]


@pytest.mark.parametrize("similarity", ["max", "mean", "rms"])
def test_pixelprune_waves_are_the_loop_over_blocks(similarity: str) -> None:
    draw = torch.Generator().manual_seed(3)
    for height, width in ((5, 7), (7, 3), (1, 6), (6, 1)):
        drawn = (torch.rand(height, width, 3, generator=draw) * 4).round() / 4
        tau = {"max": 0.3, "mean": 0.2, "rms": 0.25}[similarity]
        expected = [r * width + c for r, c in looped(drawn, similarity, tau)]
        assert pixelprune(drawn.flatten(0, 1), (1, height, width), similarity=similarity, tau=tau) == expected


def looped(drawn: torch.Tensor, similarity: str, tau: float) -> list[tuple[int, int]]:
    def far(x: torch.Tensor, y: torch.Tensor) -> float:
        apart = (x - y).abs()
        return float({"max": apart.max(), "mean": apart.mean(), "rms": apart.square().mean().sqrt()}[similarity])

    value, kept = drawn.clone(), []
    for r in range(drawn.shape[0]):
        for c in range(drawn.shape[1]):
            if r and c:
                left, up, corner = value[r, c - 1], value[r - 1, c], value[r - 1, c - 1]
                prediction = up if far(corner, left) <= tau < far(corner, up) else left
            elif r or c:
                prediction = value[r, c - 1] if c else value[r - 1, c]
            else:
                kept.append((r, c))
                continue
            if far(drawn[r, c], prediction) <= tau:
                value[r, c] = prediction
            else:
                kept.append((r, c))
    return kept


def test_pixelprune_ceiling_keeps_what_differs_most() -> None:
    drawn = blocks("abdh")
    assert pixelprune(drawn, (1, 1, 4)) == [0, 1, 2, 3]
    assert pixelprune(drawn, (1, 1, 4), keep_tokens=2) == [0, 3]
    everything = vtc.select("pixelprune", block_pixels=blocks("aaaa"), keep_ratio=1)
    assert everything.k == 4
    # Below the ceiling it changes nothing.
    assert vtc.select("pixelprune", block_pixels=blocks("aaab"), keep_ratio=0.75).keep.tolist() == [0, 3]


def test_pixelprune_over_time_knows_what_was_shown_last() -> None:
    # Two places, four frames: the second place goes a, b, b, a.
    drawn = blocks("aa", "ab", "ab", "aa")
    assert pixelprune(drawn, (4, 1, 2), over="time") == [0, 1, 3, 4, 7]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"similarity": "mae"}, "similarity must be one of"),
        ({"tau": -1}, "tau must be a number of at least 0"),
        ({"anchored": 1}, "anchored must be"),
        ({"over": "both"}, "over must be"),
    ],
)
def test_pixelprune_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(vtc.ConfigError, match=match):
        vtc.select("pixelprune", block_pixels=blocks("ab"), keep_tokens=1, **options)


def test_blocks_are_cut_as_the_tower_cuts_them() -> None:
    picture = torch.arange(2 * 5 * 6).float().view(2, 5, 6)  # the fifth row fills no patch
    (patches,) = BlockPixels().compute(PatchPixels((picture,), (2, 3), packed=False))
    assert patches.shape == (4, 12)
    assert torch.equal(patches[3], picture[:, 2:4, 3:].flatten())
    packed = BlockPixels().compute(PatchPixels((torch.rand(4, 3, 5), torch.rand(8, 3, 5)), None, packed=True))
    assert packed.shape == (1, 12, 15)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "internvl", "gemma3", "llava_next"])
@torch.no_grad()
def test_plain_parts_of_pictures_leave(family: str) -> None:
    case = build(tiny.family(family))
    inputs = case.batch("single")
    pixels = inputs["pixel_values"]
    inputs["pixel_values"] = torch.zeros_like(pixels)
    with vtc.compressed(case.model, "pixelprune", keep_tokens=10**6) as model:
        model(**inputs)
        (segment,) = vtc.report(model).segments
    crops = pixels.shape[0] if pixels.dim() == 4 else pixels.shape[1] if pixels.dim() == 5 else 1
    assert segment.tokens_after - segment.structural <= crops
    inputs["pixel_values"] = pixels  # noise: nothing leaves, and no bit changes
    plain = case.model(**inputs).logits
    with vtc.compressed(case.model, "pixelprune", keep_tokens=10**6) as model:
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_pixelprune_sees_whole_blocks_of_packed_towers() -> None:
    case = build(tiny.family("qwen2_5_vl"))
    inputs = case.batch("single")
    rows, columns = (int(size) // 2 for size in inputs["image_grid_thw"][0, 1:])
    copy = inputs["pixel_values"].unflatten(0, (-1, 4))
    copy[columns + 1] = copy[columns]  # one block repeats the one to its left, whole
    copy[columns + 2, 1:] = copy[columns + 1, 1:]  # and the next but for one patch
    inputs["pixel_values"] = copy.flatten(0, 1)
    with vtc.compressed(case.model, "pixelprune", keep_tokens=10**6) as model:
        model(**inputs)
        (segment,) = vtc.report(model).segments
    assert segment.kept.tolist() == [i for i in range(rows * columns) if i != columns + 1]


@torch.no_grad()
def test_stages_over_time_and_space_follow_each_other() -> None:
    case = build(tiny.family("qwen2_5_vl_video"))
    inputs = case.batch("single")
    frames, rows, columns = (int(size) for size in inputs["video_grid_thw"][0])
    still = inputs["pixel_values_videos"].unflatten(0, (frames, -1))
    still[:] = still[:1]
    inputs["pixel_values_videos"] = still.flatten(0, 1)
    place = (rows // 2) * (columns // 2)
    over_time = vtc.CompressionConfig("pixelprune", keep_tokens=10**6, options={"over": "time"})
    with vtc.compressed(case.model, over_time) as model:
        model(**inputs)
        kept = vtc.report(model).segments[0].kept.tolist()
    assert kept == [*range(place), *range(place, frames * place, place)]
    over_space = vtc.CompressionConfig("pixelprune", keep_tokens=10**6)
    with vtc.compressed(case.model, [over_time, over_space]) as model:
        model(**inputs)
        assert vtc.report(model).segments[0].kept.tolist() == kept


def test_pixelprune_works_in_front_of_the_tower_alone() -> None:
    case = build(tiny.family("llava"))
    with pytest.raises(vtc.UnsupportedMethodError, match="cannot work at 'decoder'"):
        vtc.compress(case.model, "pixelprune", keep_ratio=0.5, at="decoder")
    assert not vtc.is_compressed(case.model)


# --- FlowCut ---------------------------------------------------------------------------------------------------------


def attention_of(tokens: int, *, prefix: int = 1, mask: torch.Tensor | None = None, seed: int = 0) -> VisionAttention:
    draw = torch.Generator().manual_seed(seed)
    queries, keys, values = torch.randn(3, 2, 3, tokens, 4, generator=draw)
    return VisionAttention(queries, keys, values, 0.5, mask, prefix=prefix)


def test_information_flow_is_the_equation() -> None:
    raw = attention_of(7, prefix=2)  # [CLS] and a register
    share, score = InformationFlow().compute(raw)[1].T
    attention = (raw.queries[1, :, :1] @ raw.keys[1].transpose(1, 2) * 0.5).softmax(dim=-1)[:, 0].mean(dim=0)[2:]
    semantic = (raw.values[1, :, :1] @ raw.values[1].transpose(1, 2)).softmax(dim=-1)[:, 0].mean(dim=0)[2:]
    strength = raw.values[1].mean(dim=0)[2:].abs().sum(dim=1)
    torch.testing.assert_close(share[2:], attention / attention.sum())
    torch.testing.assert_close(score[2:], (attention / attention.sum() + semantic / semantic.sum()) * strength)
    assert not share[:2].any()
    assert not score[:2].any()


@pytest.mark.parametrize("signal", [InformationFlow(), ReceivedFlow()])
def test_information_flow_does_not_see_padding(signal: InformationFlow) -> None:
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 5:] = False
    padded = signal.compute(attention_of(7, mask=mask))
    whole = attention_of(7)
    cut = (whole.queries[1:, :, :5], whole.keys[1:, :, :5], whole.values[1:, :, :5])
    alone = signal.compute(VisionAttention(*cut, 0.5, prefix=1))
    torch.testing.assert_close(padded[1, :5], alone[0])
    assert not padded[1, 5:].any()


def test_received_flow_is_relative_to_its_sequence() -> None:
    one, two = attention_of(4, prefix=0), attention_of(6, prefix=0, seed=1)
    pairs = zip((one.queries, one.keys, one.values), (two.queries, two.keys, two.values), strict=True)
    packed = VisionAttention(*(torch.cat([a[:1], b[:1]], dim=2) for a, b in pairs), 0.5, None, torch.tensor([0, 4, 10]))
    values = ReceivedFlow().compute(packed)[0]
    torch.testing.assert_close(values[:4], ReceivedFlow().compute(one)[0])
    torch.testing.assert_close(values[:, 0].split([4, 6])[1].mean(), torch.tensor(1.0))


def test_flowcut_drops_more_where_attention_is_concentrated() -> None:
    flat, peaked = torch.full((16,), 1 / 16), torch.eye(16)[0]
    assert dropped(flat, 4, 2) == 0
    assert dropped(peaked, 4, 4) == 6
    assert dropped(peaked, 4, 1) == 12
    assert dropped(flat, 4, 0) == 12
    assert dropped(flat, 16, 1) == dropped(flat, 20, 0) == 0
    assert dropped(torch.ones(1), 0, 2) == 0


def test_flowcut_layers() -> None:
    clip = vtc.ModelShape(32, 24, 22)
    stages = FlowCutSelector().stages(clip, 0.25)
    assert [str(stage.site) for stage in stages] == [*(f"vision:{k}" for k in range(1, 22, 2)), "decoder"]
    assert [str(stage.site) for stage in FlowCutSelector(layers=(3, 9)).stages(clip, 0.25)] == ["vision:4", "vision:10"]
    assert FlowCutSelector().stages(clip, 1.0) == ()
    with pytest.raises(vtc.ConfigError, match="features come from tower layer 22"):
        FlowCutSelector(layers=(3, 23)).stages(clip, 0.25)
    for layers in ((), (3, 3), (5, 3), (-1,), 4):
        with pytest.raises(vtc.ConfigError, match="layers"):
            FlowCutSelector(layers=layers)
    with pytest.raises(vtc.ConfigError, match="score_source"):
        FlowCutSelector(score_source="keys")


def look_sharply(model: Any) -> None:
    """Let the tower attend to few patches; by its random weights it attends to all alike."""
    for name, weight in model.named_parameters():
        if "visi" in name or "tower" in name:
            weight.data *= 20 if name.endswith(("q_proj.weight", "query.weight")) else 1


@pytest.mark.parametrize("family", ["llava", "llava_dinov2", "llava_next", "internvl_tiles", "video_llava"])
@torch.no_grad()
def test_flowcut_leaves_its_share_of_the_whole(family: str) -> None:
    case = build(tiny.family(family))
    look_sharply(case.model)
    with vtc.compressed(case.model, "flowcut", keep_ratio=0.3) as model:
        model(**case.batch("two_images"))
        segments = vtc.report(model).segments
    for segment in segments:
        scored = segment.tokens_before - segment.structural
        assert segment.tokens_after - segment.structural == round(0.3 * scored)
        (first, some), *_ = segment.selections
        assert str(first) == ("vision:2" if family == "internvl_tiles" else "vision:1")  # its last layer is the fourth
        assert 0.3 * scored < some.k < scored


@torch.no_grad()
def test_flowcut_is_random_to_nobody() -> None:
    case = build(tiny.family("llava"))
    kept = []
    for name in ("flowcut", "random"):
        with vtc.compressed(case.model, name, keep_ratio=0.3) as model:
            model(**case.batch("single"))
            kept.append(vtc.report(model).segments[0].kept.tolist())
    assert kept[0] != kept[1]


def test_flowcut_asks_for_cls() -> None:
    case = build(tiny.family("qwen2_5_vl"))
    with pytest.raises(vtc.UnsupportedMethodError, match=r'no \[CLS\] token; try score_source="received"'):
        vtc.compress(case.model, "flowcut", keep_ratio=0.5)
    with pytest.raises(vtc.UnsupportedMethodError, match="works at places of its own"):
        vtc.compress(case.model, "flowcut", keep_ratio=0.5, score_source="received", at="decoder")
    assert not vtc.is_compressed(case.model)


# --- Adaptive Sparse ViT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", [HeadWeightedAttention(), HeadWeightedReceived()])
def test_head_weights_do_not_see_padding(signal: HeadWeightedAttention) -> None:
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 5:] = False
    padded = signal.compute(attention_of(7, mask=mask))
    whole = attention_of(7)
    cut = (whole.queries[1:, :, :5], whole.keys[1:, :, :5], whole.values[1:, :, :5])
    torch.testing.assert_close(padded[1, :5], signal.compute(VisionAttention(*cut, 0.5, prefix=1))[0])


def test_head_weighted_attention_of_one_head_is_attention() -> None:
    raw = attention_of(6)
    one = VisionAttention(raw.queries[:, :1], raw.keys[:, :1], raw.values[:, :1], 0.5, prefix=1)
    expected = (one.queries[:, 0, :1] @ one.keys[:, 0].transpose(1, 2) * 0.5).softmax(dim=-1)[:, 0]
    torch.testing.assert_close(HeadWeightedAttention().compute(one), expected)
    cells = HeadWeightedAttention().present(expected[0, 1:5].view(2, 2, 1))
    torch.testing.assert_close(cells, expected[0, 1:5].view(2, 2).sum(dim=1))


def as_vit(score: torch.Tensor, **options: Any) -> list[int]:
    budget = {"keep_tokens": 99} if "keep_ratio" not in options else {}
    given = {**budget, **options}
    return vtc.select("adaptive-sparse-vit", head_weighted_attention=score, **given).keep.tolist()


def test_as_vit_keeps_what_is_above() -> None:
    score = torch.tensor([0.1, 0.3, 0.05, 0.45, 0.1])
    assert as_vit(score, thresholds=1.0) == [1, 3]  # a fifth each on average
    assert as_vit(score, thresholds=0.5, multiplier=2.0) == [1, 3]
    assert as_vit(score) == [1, 3]  # the last of the released thresholds, 0.6
    assert as_vit(score, thresholds=1.5) == [3]  # strictly above
    assert as_vit(score, thresholds=5.0) == [3]  # at least one
    assert as_vit(score, thresholds=0.0) == [0, 1, 2, 3, 4]
    assert as_vit(score, thresholds=0.0, keep_ratio=0.4) == [1, 3]  # the ceiling
    assert as_vit(torch.zeros(3), thresholds=1.0) == [0]
    assert as_vit(torch.ones(1), thresholds=2.0) == [0]


@pytest.mark.parametrize(("depth", "layers"), [(12, (4, 7, 10)), (16, (5, 9, 13)), (20, (6, 11, 16)), (3, (1, 2))])
def test_as_vit_places(depth: int, layers: tuple[int, ...]) -> None:
    method = AdaptiveSparseVitSelector().resolve(vtc.ModelShape(4, depth, depth - 1), 0.5)
    assert method.layers == layers
    assert method.thresholds == ((0.2, 0.4, 0.6) if depth > 3 else (0.4, 0.6))
    assert AdaptiveSparseVitSelector().stages(vtc.ModelShape(4, depth, depth - 1), 1.0) == ()
    earlier = AdaptiveSparseVitSelector().resolve(vtc.ModelShape(4, depth, depth - 2), 0.5)
    assert earlier.layers == (layers if depth > 3 else (1,))  # the layer that makes the features is the last


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"thresholds": (0.1, -1)}, "thresholds must be a number of at least 0"),
        ({"thresholds": "high"}, "thresholds must be a number"),
        ({"thresholds": (0.1, 0.2)}, r"2 values for the 3 layers \(4, 7, 10\)"),
        ({"layers": (0, 3)}, "layers must be an integer of at least 1"),
        ({"layers": (3, 3)}, "ascending tower layers"),
        ({"layers": (3, 12)}, "features come from tower layer 11"),
        ({"layers": (3, 4)}, r"give thresholds, one for each of the layers \(3, 4\)"),
        ({"multiplier": -1}, "multiplier must be a number of at least 0"),
        ({"score_source": "keys"}, "score_source must be one of"),
    ],
)
def test_as_vit_options(options: dict[str, Any], match: str) -> None:
    given = {**options, "thresholds": 0.5} if options.get("layers") == (3, 12) else options
    with pytest.raises(vtc.ConfigError, match=match):
        AdaptiveSparseVitSelector(**given).stages(vtc.ModelShape(4, 12, 11), 0.5)


@torch.no_grad()
def test_every_crop_of_a_batch_keeps_its_own_number() -> None:
    case = build(tiny.family("llava"))
    look_sharply(case.model)
    with vtc.compressed(case.model, "adaptive-sparse-vit", keep_tokens=99, thresholds=0.3) as model:
        model(**case.batch("two_images"))
        together = [segment.kept.tolist() for segment in vtc.report(model).segments]
        alone = []
        for row in case.rows("two_images"):
            model(**row)
            alone += [segment.kept.tolist() for segment in vtc.report(model).segments]
    assert together == alone
    assert len({len(kept) for kept in together}) > 1


def test_as_vit_asks_for_cls() -> None:
    case = build(tiny.family("qwen3_vl"))
    with pytest.raises(vtc.UnsupportedMethodError, match=r'no \[CLS\] token; try score_source="received"'):
        vtc.compress(case.model, "adaptive-sparse-vit", keep_ratio=0.5)
    vtc.compress(case.model, "adaptive-sparse-vit", keep_ratio=0.5, score_source="received")


def test_signals_of_patches_are_refused_behind_the_tower() -> None:
    @dataclasses.dataclass(frozen=True)
    class Late(vtc.ScoreSelector):
        """Reads patches of a token apart where there are none."""

        name, paper = "late", "a test"
        requires = (HeadWeightedAttention(),)

        def score(self, ctx: vtc.VisualContext) -> torch.Tensor:
            return ctx[HeadWeightedAttention]

    vtc.register_selector(Late)
    case = build(tiny.family("llava"))
    with pytest.raises(vtc.UnsupportedMethodError, match="patches of a token apart"):
        vtc.compress(case.model, "late", keep_ratio=0.5)
    assert not vtc.is_compressed(case.model)


# --- VScan -----------------------------------------------------------------------------------------------------------


def vscan(local: Any, far: Any, grid: Any, budget: int, features: torch.Tensor | None = None, **options: Any) -> Any:
    attention = torch.stack([torch.as_tensor(local), torch.as_tensor(far)]).float()[:, None]
    given = torch.eye(attention.shape[-1]) if features is None else features
    return vtc.select(
        "vscan",
        features=given,
        received_attention=attention,
        grid_thw=grid,
        keep_tokens=budget,
        score_source="received",
        **options,
    )


def test_vscan_takes_of_every_window() -> None:
    # Two windows of 2 x 2 in a row; a plain top two would take both from the left one.
    local, far = [9, 8, 1, 2, 7, 6, 3, 4], [0, 0, 0, 0, 0, 0, 5, 0]
    assert vscan(local, far, (1, 2, 4), 4, window=2).keep.tolist() == [0, 1, 6, 7]
    assert vscan(local, far, (1, 2, 4), 4, window=9).keep.tolist() == [0, 1, 2, 6]
    # Of an odd budget the smaller half is local.
    assert vscan(local, far, (1, 2, 4), 3, window=2).keep.tolist() == [0, 1, 6]
    assert vscan(local, far, (1, 2, 4), 1, window=2).keep.tolist() == [6]
    assert vscan(local, far, (1, 2, 4), 8, window=2).assign is None


def test_vscan_windows_reach_the_edge() -> None:
    local = torch.arange(15).float()
    # 3 x 5 tokens are one window of 2 x 2 high and two wide: the last column and row belong to the last of them.
    assert vscan(local, torch.zeros(15), (1, 3, 5), 4, window=2).keep.tolist() == [0, 1, 11, 14]
    assert vscan(local, torch.zeros(15), (1, 3, 5), 4, window=9).keep.tolist() == [0, 1, 13, 14]


def test_vscan_goes_on_where_windows_run_out() -> None:
    # The second view is one token: its window cannot offer four.
    local = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    attention, window = torch.tensor(local).float(), torch.tensor([0] * 8 + [1])
    assert best_of_windows(attention, window, 4).tolist() == [8, 7, 6, 5]
    assert best_of_windows(attention, window, 8).tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert best_of_windows(attention, window.flip(0), 2).tolist() == [8, 0]
    assert vscan(local, [0] * 9, [(1, 2, 4), (1, 1, 1)], 4, window=4).keep.tolist() == [0, 1, 7, 8]


def test_vscan_merges_into_the_most_similar() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.5], [0.5, 3.0], [0.0, 0.0]])
    selection = vscan([5, 1, 1, 1, 1], [0, 5, 1, 1, 1], (1, 1, 5), 2, features)
    assert selection.keep.tolist() == [0, 1]
    assert selection.slots.tolist() == [0, 1, 0, 1, 0]  # nothing is similar to zeros: the first
    expected = torch.stack([features[[0, 2, 4]].mean(dim=0), features[[1, 3]].mean(dim=0)])
    torch.testing.assert_close(selection.merge(features), expected)


def test_vscan_layers() -> None:
    clip, qwen = vtc.ModelShape(32, 24, 22), vtc.ModelShape(28, 32, 31)
    first, second = VScanSelector().stages(clip, 0.25)
    assert first.requires == (vtc.ClsAttention((5, 22)),)
    assert str(second.site) == "decoder:16"
    first, second = VScanSelector(score_source="received").stages(qwen, 0.25)
    assert first.requires == (vtc.ReceivedAttention((7, 31)),)
    assert (str(second.site), second.keep) == ("decoder:14", pytest.approx(1 / 3))
    assert len(VScanSelector(inner=1.0).stages(clip, 0.25)) == len(VScanSelector().stages(clip, 1.0)) == 1
    with pytest.raises(vtc.ConfigError, match="inner must be a number between 0 and 1"):
        VScanSelector(inner=2)
    with pytest.raises(vtc.ConfigError, match="window must be an integer of at least 1"):
        VScanSelector(window=0)
    with pytest.raises(vtc.ConfigError, match="score_source"):
        VScanSelector(score_source="text")


@torch.no_grad()
def test_vscan_with_cls() -> None:
    case = build(tiny.family("llava"))
    with vtc.compressed(case.model, "vscan", keep_ratio=0.5, inner=0.5) as model:
        model(**case.batch("single"))
        report = vtc.report(model)
    assert [(str(site), selection.k) for site, selection in report.segments[0].selections] == [
        ("decoder", 8),
        ("decoder:2", 4),
    ]
    with pytest.raises(vtc.UnsupportedMethodError, match=r'no \[CLS\] token; try score_source="received"'):
        vtc.compress(build(tiny.family("gemma3")).model, "vscan", keep_ratio=0.5)
