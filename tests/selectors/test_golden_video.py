"""Video methods that merge or compare frames against their authors' functions, and by hand; see tests/golden/README.md.

Where the authors' code loses tokens or fails, the tests say what ours does instead.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.selectors.inputs import make_context
from tests.selectors.test_golden import case, load
from tests.selectors.test_golden_peers import TOLERANCE, prefixes
from vtc import kernels
from vtc.bench._video_transcriptions import runs_of
from vtc.core.observations import TokenGrids
from vtc.errors import ConfigError
from vtc.functional import select
from vtc.registry import get_selector
from vtc.selectors import FastVidSelector, PruneVidSelector
from vtc.selectors.flashvid import attended_and_diverse
from vtc.selectors.frames import Frames, cut_scenes, earlier_at_place, frame_of, proportional, shared
from vtc.selectors.holitom import best_windows
from vtc.selectors.prunevid import group_shares, likeness, windows_of
from vtc.selectors.static_cells import places_of, static_units


def test_all_files_are_there() -> None:
    assert len(prefixes("fastvid", "T")) == 2
    assert len(prefixes("prunevid", "labels")) == 2
    assert len(prefixes("prunevid", "cluster_num")) == 2
    assert len(prefixes("dycoke", "x")) == 5


# --- fastvid ---------------------------------------------------------------------------------------------------------


def video(frames: int, tokens: int) -> Frames:
    """Frames of so many tokens in a row."""
    frame = torch.arange(frames).repeat_interleave(tokens)
    return Frames(TokenGrids(((frames, 1, tokens),)).origin(), frame, frame, [tokens] * frames)


def _fastvid(golden: dict[str, Any]) -> tuple[FastVidSelector, Tensor, Tensor]:
    """The selector of a case, its video tokens (N, D) and their frames (N,)."""
    selector = FastVidSelector(
        segments=golden["DySeg_c"],
        tau=golden["DySeg_tau"],
        context=golden["STPrune_d"],
        interval=golden["DTM_p"],
        beta=golden["DTM_beta"],
    )
    frames, per_frame, start = golden["T"], golden["tokens_per_frame"], golden["video_start"]
    x = golden["hidden"][0, start : start + frames * per_frame]
    return selector, x, torch.arange(frames).repeat_interleave(per_frame)


@pytest.mark.parametrize("prefix", prefixes("fastvid", "T"))
def test_fastvid(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = case(load("fastvid.npz"), prefix)
    assert golden["noise_invariant"]
    selector, x, frame = _fastvid(golden)
    segment = cut_scenes(golden["frame_global"], selector.segments, selector.tau)
    assert torch.bincount(segment).tolist() == golden["segment_sizes"].tolist()
    theirs = golden["keep_indices"] - golden["video_start"]
    visual = (theirs >= 0) & (theirs < len(x))
    theirs, out = theirs[visual], golden["out_hidden"][0, visual]
    each = int(golden["tokens_per_frame"] * golden["retention_ratio"])
    context = int(each * golden["STPrune_d"])
    if len(theirs) < each * golden["T"]:  # anchor frames got a part that was rounded down
        counts = selector._counts

        def rounded(self: FastVidSelector, sizes: list[int], segments: list[int], budget: int) -> tuple[list[int], ...]:
            salient, anchors, turn = counts(sizes, segments, each * golden["T"])
            lengths = [segments.count(segment) for segment in segments]
            parts = [context * length // -(-length // self.interval) for length in lengths]
            return salient, [part if few else 0 for part, few in zip(parts, anchors, strict=True)], turn

        monkeypatch.setattr(FastVidSelector, "_counts", rounded)
    frames = Frames(torch.empty(0), frame, frame, torch.bincount(frame).tolist())
    selection = selector.merged(x, golden["frame_attn"].flatten(), frames, segment, len(theirs))
    assert torch.equal(selection.keep, theirs)
    torch.testing.assert_close(selection.merge(x), out, **TOLERANCE)


@pytest.mark.parametrize("budget", [1, 3, 7, 20, 41, 59])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 12])
def test_fastvid_gives_what_rounding_would_lose_to_anchors(frames: int, budget: int) -> None:
    grid = (frames, 3, 60 // (3 * frames)) if 60 % (3 * frames) == 0 else (frames, 1, 60 // frames)
    n = frames * grid[1] * grid[2]
    selector = FastVidSelector(segments=2, tau=0.0)
    sizes, segment = torch.full((frames,), n // frames), (torch.arange(frames) > 0).long()
    salient, anchors, turn = map(torch.tensor, selector._counts(sizes.tolist(), segment.tolist(), budget))
    assert int(salient.sum() + anchors.sum()) == budget
    assert bool((salient + anchors <= sizes).all())
    assert not anchors[turn < 0].any()
    assert [int(turn[segment == s].max()) + 1 for s in range(int(segment.max()) + 1)] == [
        -(-int(length) // 4) for length in torch.bincount(segment)
    ]


def test_fastvid_by_hand() -> None:
    """Two frames of one scene: the best token of each is salient, and the last frame has the anchor of both rests."""
    x = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0], [1.0, 0.1], [1.0, 0.0]])
    attention = torch.tensor([[[0.9, 0.1, 0.2, 0.9, 0.3, 0.1]]])
    options = {"received_attention": attention, "grid_thw": (2, 1, 3), "segments": 1, "tau": -1.0}
    selection = select("fastvid", features=x, keep_tokens=4, context=0.5, **options)
    assert selection.keep.tolist() == [0, 3, 4, 5], "both other tokens of the last frame are anchors"
    merged = selection.merge(x)
    assert torch.equal(merged[:2], x[[0, 3]])
    # To the first anchor the token that points most its way, (0, 1); to the second its equal in the other frame.
    torch.testing.assert_close(merged[2], 0.6 * x[4] + 0.4 * (x[4] + x[2]) / 2)
    torch.testing.assert_close(merged[3], x[5])
    alone = select("fastvid", features=x, keep_tokens=4, context=0.5, **{**options, "segments": 8})
    assert alone.keep.tolist() == [0, 1, 3, 4], "every frame is a segment, with an anchor of its own"


# --- dycoke ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", prefixes("dycoke", "indices_in_output_order"))
def test_dycoke(prefix: str) -> None:
    golden = case(load("dycoke.npz"), prefix)
    frames, n = golden["T"], golden["tokens_per_frame"]
    each = int((1 - golden["k"]) * n)
    first = -(-frames // 4)
    grid = (frames, 1, n)
    selection = select("dycoke", features=golden["x"], grid_thw=grid, keep_tokens=first * n + (frames - first) * each)
    (mask,) = selection.grid_mask((grid,))
    theirs = torch.zeros(frames * n, dtype=torch.bool)
    theirs[golden["indices_in_output_order"]] = True
    theirs = theirs.view(frames, 1, n)
    last = 4 * ((frames - frames % 2 - 1) // 4) + 2  # the third frame of the last group stays whole there
    for number in range(frames):
        if number == last and frames % 2 == 0:
            assert theirs[number].all()
            assert int(mask[number].sum()) == each
        elif number == frames - 1 and frames % 2:
            assert not theirs[number].any(), "the last of an odd number of frames is lost there"
            assert mask[number].any()
        elif number != last:
            assert torch.equal(mask[number], theirs[number]), number


def test_dycoke_of_few_frames() -> None:
    golden = case(load("dycoke.npz"), "c4_")
    assert golden["raises"]
    n = golden["tokens_per_frame"]
    keep = select("dycoke", features=golden["x"], grid_thw=(4, 1, n), keep_tokens=n + 3).keep.tolist()
    assert keep[:n] == list(range(n))
    assert [index // n for index in keep[n:]] == [1, 2, 3], "one token of every other frame"
    picture = select("dycoke", features=golden["x"][:n], grid_thw=(1, 3, 4), keep_tokens=5)
    assert torch.equal(picture.keep, select("uniform", grid_thw=(1, 3, 4), keep_tokens=5).keep)


def test_dycoke_by_hand() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    # Place 0 turns in the second frame, 1 in the third (and stays so in the fourth), nothing in the fifth.
    x = torch.stack([a, a, -a, a, a, b, b, b, a, a])
    options = {"features": x, "grid_thw": (5, 1, 2)}
    assert select("dycoke", keep_tokens=7, **options).keep.tolist() == [0, 1, 2, 5, 6, 8, 9]
    # The fourth frame is compared with the third: place 0 turned, place 1 did not.
    earlier = earlier_at_place(TokenGrids(((5, 1, 2),)).origin(), torch.tensor([0, 1, 2, 1, 0]).repeat_interleave(2))
    assert earlier.tolist() == [-1, -1, 0, 1, 0, 1, 4, 5, -1, -1]


def test_dycoke_windows_of_four_are_the_whole() -> None:
    x = torch.randn(8 * 6, 5, generator=torch.Generator().manual_seed(0))
    whole = select("dycoke", features=x, grid_thw=(8, 2, 3), keep_tokens=24).keep
    parts = [select("dycoke", features=part, grid_thw=(4, 2, 3), keep_tokens=12).keep for part in x.split(24)]
    assert torch.equal(whole, torch.cat([parts[0], parts[1] + 24]))


def test_dycoke_after_a_stage_that_dropped_tokens() -> None:
    origin = TokenGrids(((3, 1, 2),)).origin()[[0, 2, 3, 4]]  # place 1 of the first frame has gone
    assert earlier_at_place(origin, torch.tensor([0, 1, 1, 2])).tolist() == [-1, 0, -1, 0]


# --- prunevid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", prefixes("prunevid", "cluster_num"))
def test_prunevid_clusters(prefix: str) -> None:
    golden = case(load("prunevid.npz"), prefix)
    assert golden["noise_invariant"]
    for x, labels in zip(golden["x"], golden["idx"], strict=True):
        one = torch.zeros(len(x), dtype=torch.long)
        count = torch.tensor([golden["cluster_num"]])
        centres = kernels.density_peaks(x, one, golden["k"]).sort(descending=True).indices[: int(count)]
        assert torch.equal(kernels.density_clusters(x, one, count, golden["k"]), centres[labels])


@pytest.mark.parametrize("prefix", prefixes("prunevid", "labels"))
def test_prunevid_windows(prefix: str) -> None:
    golden = case(load("prunevid.npz"), prefix)
    (labels,), (segments,), (refined,) = golden["labels"], golden["segments"], golden["refined"]
    window = windows_of(labels)
    assert torch.bincount(window).tolist() == segments.tolist()
    assert torch.equal(window, torch.nn.functional.pad(refined[1:] != refined[:-1], (1, 0)).cumsum(0))


def test_prunevid() -> None:
    golden = case(load("prunevid.npz"), "c6_")
    frames, _, width = golden["frames"].shape
    x, (out,) = golden["frames"].reshape(-1, width), golden["out"]
    options = {"segments": golden["temporal_segment_ratio"], "tau": golden["tau"]}
    selection = select("prunevid", features=x, grid_thw=(frames, 6, 6), keep_tokens=len(out), **options)
    window = PruneVidSelector(**options).windows(golden["frames"].mean(dim=1))
    assert torch.bincount(window).tolist() == golden["window_sizes"].tolist()
    # Theirs come window by window, static ones first, clusters by their centres: as sets they are ours.
    ours = selection.merge(x)
    partner = torch.cdist(out, ours).argmin(dim=1)
    assert partner.unique().numel() == selection.k
    torch.testing.assert_close(ours[partner], out, **TOLERANCE)


def test_prunevid_by_hand() -> None:
    """One window: the first place stands still and becomes its mean; with room for more, it does not."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, -1.0]])
    places, window = places_of(video(2, 2)), torch.tensor([0, 0])
    alike = likeness(x, places, window)
    assert alike.tolist() == [pytest.approx([1.0, -1.0])]
    units = static_units(places, window, alike, 0.8, 3)
    assert units.stands.tolist() == [0, 1, 0, 3]
    assert units.group.tolist() == [2, 0, -1, 1]
    assert units.moving.tolist() == [-1, 0, -1, 1]
    assert units.sizes.tolist() == [1, 1, 1, 0]
    assert static_units(places, window, alike, 0.8, 4).stands.tolist() == [0, 1, 2, 3]
    selection = select("prunevid", features=x, grid_thw=(2, 1, 2), keep_tokens=3)
    assert selection.merge(x).tolist() == [[2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]


def test_prunevid_of_a_still_video() -> None:
    """All places are static: there is no token by itself."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    selection = select("prunevid", features=x, grid_thw=(5, 2, 3), keep_tokens=4, segments=0.1)
    assert selection.keep.max() < 6
    torch.testing.assert_close(selection.sizes.sum(), torch.tensor(30))
    assert (
        select("holitom", features=x, received_attention=torch.ones(1, 1, 30), grid_thw=(5, 2, 3), keep_tokens=4).k == 4
    )


def test_prunevid_takes_the_least_alike_apart_first() -> None:
    places, window = places_of(video(3, 3)), torch.zeros(3, dtype=torch.long)
    alike = torch.tensor([[0.95, 0.9, 0.85]])
    units = {budget: static_units(places, window, alike, 0.8, budget) for budget in (3, 4, 5, 6, 8)}
    assert [int((unit.group == 3).sum()) for unit in units.values()] == [3, 2, 2, 1, 0]
    left = units[4].stands.unique().tolist()
    assert left == [0, 1, 2, 5, 8], "the third place is in three frames"


def test_prunevid_shares() -> None:
    def shares(budget: int, sizes: list[int]) -> list[int]:
        return group_shares(budget, torch.tensor(sizes)).tolist()

    assert shares(10, [4, 20, 20]) == [4, 3, 3], "a small group stays whole"
    assert shares(5, [4, 20, 20]) == [1, 2, 2], "unless nothing would be left"
    assert shares(3, [1, 2]) == [1, 2]
    assert shares(4, [0, 20, 0, 20]) == [0, 2, 0, 2]


def test_shared_is_proportional() -> None:
    for seed in range(50):
        sizes = torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(seed))
        for total in range(int(sizes.sum()) + 1):
            assert shared(total, sizes).tolist() == proportional(total, sizes.tolist())
    assert shared(0, torch.zeros(2, dtype=torch.long)).tolist() == [0, 0]


def test_windows_of_labels() -> None:
    def windows(labels: list[int]) -> list[int]:
        found = windows_of(torch.tensor(labels)).tolist()
        assert found == runs_of(labels)
        return found

    assert windows([0, 0, 1, 2, 2, 2]) == [0, 0, 1, 1, 1, 1], "the longer neighbour"
    assert windows([0, 0, 1, 2, 2]) == [0, 0, 0, 1, 1], "the left of equals"
    assert windows([2, 0, 0]) == [0, 0, 0]
    assert windows([0, 0, 1, 0, 0]) == [0] * 5, "one window again"
    assert windows([1, 0, 0, 1, 0, 1, 1, 1]) == [0] * 5 + [1] * 3, "the left one has become as long as the right"
    assert windows([2, 0, 0, 2, 1, 1, 1, 0, 2, 2, 2]) == [0] * 4 + [1] * 4 + [2] * 3
    assert windows([0]) == [0]
    for seed in range(200):
        windows(
            torch.randint(0, 4, (1 + seed % 12,), generator=torch.Generator().manual_seed(seed))
            .clamp(max=seed % 12)
            .tolist()
        )


# --- holitom ---------------------------------------------------------------------------------------------------------


def _saved(still: Tensor, window: Tensor) -> int:
    """Tokens that merging in time saves in these windows."""
    total = 0
    for number in window.unique().tolist():
        first, last = (window == number).nonzero()[[0, -1], 0].tolist()
        total += int(still[first:last].all(dim=0).sum()) * (last - first)
    return total


def test_holitom_windows() -> None:
    golden = load("holitom_windows_01.npz")
    still = golden["similarity"] > golden["tau"]
    window = best_windows(still)
    ends = [(window == number).nonzero()[[0, -1], 0].tolist() for number in range(int(window.max()) + 1)]
    assert ends == golden["windows"].tolist()
    assert _saved(still, window) == golden["total_reduced"]


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_holitom_windows_save_the_most(frames: int) -> None:
    for seed in range(10):
        still = torch.rand(frames - 1, 4, generator=torch.Generator().manual_seed(seed)) > 0.3
        cuts = itertools.product([0, 1], repeat=frames - 1)
        best = max(_saved(still, torch.tensor([0, *cut]).cumsum(0)) for cut in cuts)
        window = best_windows(still)
        assert len(window) == frames
        assert _saved(still, window) == best


def test_holitom_by_hand() -> None:
    """Of three frames, the third all new: two static places merge over the first two, the rest is by attention."""
    a, b, c = torch.eye(3)
    x = torch.stack([a, b, c, 3 * a, b, -c, -a, -b, c])
    attention = torch.tensor([[[0.0, 0.0, 0.2, 0.0, 0.0, 0.1, 0.5, 0.7, 0.6]]])
    options = {"features": x, "received_attention": attention, "grid_thw": (3, 1, 3)}
    selection = select("holitom", keep_tokens=7, **options)
    assert selection.keep.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert selection.merge(x).tolist() == [[2.0, 0, 0], [0, 1.0, 0], *x[[2, 5, 6, 7, 8]].tolist()]
    assert select("holitom", keep_tokens=8, **options).k == 8, "a static place is taken apart"
    # Seven are left: of two static, one, one and three others, 4 tokens are 1.1, 0.6, 0.6 and 1.7.
    few = select("holitom", keep_tokens=4, **options)
    assert few.keep.tolist() == [0, 2, 7, 8]
    torch.testing.assert_close(few.merge(x)[0], x[[0, 1, 3, 4]].mean(dim=0))


# --- flashvid --------------------------------------------------------------------------------------------------------


def test_flashvid_attention_and_diversity() -> None:
    golden = load("flashvid_adts_01.npz")
    x, attention, k = golden["features"], golden["cls_attention"], golden["k"]
    frames, n = attention.shape
    mask = attended_and_diverse(x.flatten(0, 1), attention.flatten(), [n] * frames, [k] * frames)
    for row, kept in zip(mask.view(frames, n), golden["selected_sorted"], strict=True):
        assert torch.equal(row.nonzero()[:, 0], kept)
    # Frames of other sizes and counts do not matter to each other.
    left = torch.cat([torch.arange(n), n + torch.arange(5), 2 * n + torch.arange(n)])
    ragged = attended_and_diverse(x.flatten(0, 1)[left], attention.flatten()[left], [n, 5, n], [k, 2, k])
    assert torch.equal(ragged[:n], mask[:n])
    assert torch.equal(ragged[-n:], mask[-n:])
    assert int(ragged.sum()) == 2 * k + 2


def test_flashvid_by_hand() -> None:
    """Two frames of one scene: the second token moves to the third place, where its tree is found."""
    a, b, c = torch.eye(3)
    x = torch.stack([a, b, 0.1 * a + c, a, c, 3 * b])
    attention = torch.tensor([[[0.9, 0.1, 0.1, 0.9, 0.1, 0.1]]])
    options = {"features": x, "received_attention": attention, "grid_thw": (2, 1, 3), "segments": 1, "tau": -1.0}
    selection = select("flashvid", keep_tokens=4, alpha=0.5, **options)
    assert selection.keep.tolist() == [0, 1, 2, 3], "of either frame the most attended; trees stand in the first"
    torch.testing.assert_close(selection.merge(x), torch.stack([x[0], 2 * b, (x[2] + x[4]) / 2, x[3]]))
    cut = select("flashvid", keep_tokens=5, alpha=0.5, **options)
    assert cut.keep.tolist() == [0, 1, 2, 3, 4], "with room for one more, the weaker link is cut"
    scenes = select("flashvid", keep_tokens=4, alpha=0.5, **{**options, "segments": 2})
    assert [index // 3 for index in scenes.keep.tolist()] == [0, 0, 1, 1], "trees end with a scene"
    alone = select("flashvid", keep_tokens=4, alpha=0.5, link=1.0, **options)
    assert [index // 3 for index in alone.keep.tolist()] == [0, 0, 1, 1]


# --- all of them -----------------------------------------------------------------------------------------------------

MERGING = ("fastvid", "prunevid", "holitom", "flashvid")


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("grid", [(1, 3, 4), (2, 2, 3), (3, 2, 3), (5, 2, 3), (9, 2, 2)], ids=str)
def test_mass_and_place(method: str, grid: tuple[int, int, int]) -> None:
    """Merged tokens are averages, and stand at a token that flows into them."""
    selector = get_selector(method)
    for budget in (1, 2, 5, grid[0] * grid[1] * grid[2] - 1):
        context = make_context(selector, budget, (grid,))
        selection = selector.select(context)
        assert selection.k == budget
        torch.testing.assert_close(selection.merge(torch.ones(context.n, 1)), torch.ones(budget, 1))
        assert torch.equal(selection.slots[selection.keep], torch.arange(budget))


@pytest.mark.parametrize("method", ["dycoke", *MERGING])
def test_frames_may_have_lost_tokens(method: str) -> None:
    """An earlier stage has dropped some tokens, and one whole frame."""
    selector = get_selector(method)
    context = make_context(selector, 9, ((6, 2, 3),))
    left = torch.tensor([i for i in range(36) if i not in (0, 7, 20) and i // 6 != 2])
    context.features = context.features[left]
    context.signals = {
        signal: value[left] if signal.axes[0] == "N" else value[..., left] if signal.axes[-1] == "N" else value
        for signal, value in context.signals.items()
    }
    context.grids = ((1, 1, len(left)),)
    assert int(frame_of(context.check().signals[next(s for s in context.signals if s.name == "origin")]).max()) == 4
    assert selector.select(context).k == 9


@pytest.mark.parametrize("method", ["dycoke", *MERGING])
def test_differs_from_chance(method: str) -> None:
    grids = ((5, 3, 4),)
    chosen, drawn = (
        get_selector(name).select(make_context(get_selector(name), 20, grids)).keep.tolist()
        for name in (method, "random")
    )
    assert chosen != drawn


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fastvid", {"segments": 0}),
        ("fastvid", {"interval": 0}),
        ("fastvid", {"tau": 1.5}),
        ("fastvid", {"context": -0.1}),
        ("fastvid", {"beta": True}),
        ("fastvid", {"score_source": "pooling"}),
        ("prunevid", {"segments": 2.0}),
        ("prunevid", {"tau": "high"}),
        ("holitom", {"tau": 2}),
        ("flashvid", {"link": 2}),
        ("flashvid", {"alpha": 2}),
        ("flashvid", {"segments": 0}),
    ],
)
def test_refuses_options(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{method}: {next(iter(options))}"):
        get_selector(method, **options)
