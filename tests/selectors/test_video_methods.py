"""The methods that look at time: `evs` and `vidcom2`, against their authors' numbers and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.selectors.inputs import make_context
from vtc.bench.memory import peak_bytes
from vtc.core.observations import TokenGrids
from vtc.errors import ConfigError
from vtc.functional import select
from vtc.registry import get_selector
from vtc.selectors.evs import before
from vtc.selectors.frames import lowest_per_group
from vtc.selectors.vidcom2 import frame_budgets, typicality

GOLDEN = Path(__file__).parent.parent / "golden"
EVS = dict(np.load(GOLDEN / "evs.npz", allow_pickle=False))
VIDCOM2 = dict(np.load(GOLDEN / "vidcom2.npz", allow_pickle=False))


def case(data: dict[str, Any], number: int) -> dict[str, Any]:
    prefix = f"c{number}_"
    return {name.removeprefix(prefix): value for name, value in data.items() if name.startswith(prefix)}


# --------------------------------------------------------------------------------------------------------------- evs


@pytest.mark.parametrize("number", [0, 2, 3, 5, 6])
def test_evs_keeps_what_the_released_code_keeps(number: int) -> None:
    golden = case(EVS, number)
    t, h, w = (int(edge) for edge in golden["thw"])
    merge = int(golden["merge"])
    grid = (t, h // merge, w // merge)
    x = torch.from_numpy(golden["x"])
    kept = int(golden["mask"].sum())
    selection = select("evs", features=x, grid_thw=grid, keep_tokens=kept)
    assert selection.k == kept
    (mask,) = selection.grid_mask((grid,))
    assert mask[0].all()
    if number == 6:  # bit-identical frames: the released choice is rounding noise, ours the lower index
        assert selection.keep.tolist() == list(range(kept))
    else:
        assert selection.mask.tolist() == golden["mask"].tolist()
        assert mask.flatten(1).sum(dim=1).tolist() == golden["per_frame"].tolist()


def test_evs_by_hand() -> None:
    # Three frames of three places: the first place never changes, the second turns by 90 degrees, the third by 180.
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    x = torch.stack([a, a, a, a, b, -a, a, b, -a])
    assert before(TokenGrids(((3, 1, 3),)).origin()).tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5]
    assert select("evs", features=x, grid_thw=(3, 1, 3), keep_tokens=4).keep.tolist() == [0, 1, 2, 5]
    assert select("evs", features=x, grid_thw=(3, 1, 3), keep_tokens=5).keep.tolist() == [0, 1, 2, 4, 5]
    assert select("evs", features=x, grid_thw=(3, 1, 3), keep_tokens=6).keep.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 11])
def test_evs_holds_a_budget_below_one_frame(budget: int) -> None:
    x = torch.randn(48, 8)
    keep = select("evs", features=x, grid_thw=(4, 3, 4), keep_tokens=budget).keep
    assert len(keep) == budget
    assert keep.max() < 12
    assert torch.equal(keep, select("uniform", grid_thw=(1, 3, 4), keep_tokens=budget).keep)


def test_evs_compares_with_the_last_frame_that_still_has_the_place() -> None:
    # An earlier stage has dropped place 0 of frame 1, so frame 2 is compared with frame 0 there.
    origin = TokenGrids(((3, 1, 2),)).origin()[[0, 1, 3, 4, 5]]
    assert before(origin).tolist() == [-1, -1, 1, 0, 2]


def test_evs_does_not_compare_tiles() -> None:
    assert before(TokenGrids(((1, 2, 3), (1, 2, 2))).origin()).tolist() == [-1] * 10


# ----------------------------------------------------------------------------------------------------------- vidcom2


def frame_of(golden: dict[str, Any]) -> torch.Tensor:
    t, h, w = (int(golden.get(name, default)) for name, default in (("T", 3), ("h", 13), ("w", 13)))
    return torch.arange(t).repeat_interleave(h * w)


@pytest.mark.parametrize("number", [0, 2, 3, 5])
def test_vidcom2_scores_and_frame_budgets_are_the_authors(number: int) -> None:
    golden = case(VIDCOM2, number)
    frame = frame_of(golden)
    to_video, to_frame = typicality(torch.from_numpy(golden["x"]), frame, int(frame[-1]) + 1)
    for name, ours in (("video_score", to_video), ("frame_score", to_frame)):
        if name in golden:
            np.testing.assert_allclose(ours.numpy(), golden[name].flatten(), rtol=1e-4, atol=1e-5)
    shares = frame_budgets(to_video, frame, int(frame[-1]) + 1, float(golden["base_scale"]))
    assert shares.tolist() == golden["per_frame_k"].tolist()
    chosen = lowest_per_group(to_video + to_frame, frame, shares).nonzero()[:, 0]
    if number == 5:  # a newline after each row of 13, which counts in the authors' indices
        row, column = golden["global_indices"] // 14, golden["global_indices"] % 14
        patches = sorted((row * 13 + column)[column < 13].tolist())
        assert chosen.tolist() == patches
    else:
        assert chosen.tolist() == sorted(golden["global_indices"].tolist())


@pytest.mark.parametrize("number", [0, 2, 3])
def test_vidcom2_meets_the_count_as_the_variant_in_vllm_does(number: int) -> None:
    golden = case(VIDCOM2, number)
    grid = tuple(int(golden[name]) for name in ("T", "h", "w"))
    count = int(golden["vllm_mask"].sum())
    assert count == golden["vllm_count"]
    # The fraction, or the number that it comes to.
    for budget in ({"keep_ratio": 1 - float(golden["vllm_q"])}, {"keep_tokens": count}):
        selection = select("vidcom2", features=torch.from_numpy(golden["x"]), grid_thw=grid, **budget)
        assert selection.k == count
        assert selection.mask.tolist() == golden["vllm_mask"].tolist()


def test_vidcom2_shares_out_the_fraction_and_not_the_rounded_budget() -> None:
    """Of 36 tokens 0.24 are 8.64, rounded to 9, which happens to be what the frames' 0.24 of 9 tokens come to."""
    x, frame = torch.randn(36, 8, generator=torch.Generator().manual_seed(33)), torch.arange(4).repeat_interleave(9)
    video, own = typicality(x, frame, 4)
    chosen = lowest_per_group(video + own, frame, frame_budgets(video, frame, 4, 0.24))
    keep = select("vidcom2", features=x, grid_thw=(4, 1, 9), keep_ratio=0.24).mask
    assert torch.equal(keep, chosen)


def test_vidcom2_takes_the_first_of_equally_quiet_channels() -> None:
    values = torch.arange(6.0)
    x = torch.stack([values[torch.randperm(6, generator=torch.Generator().manual_seed(i))] for i in range(40)], dim=1)
    unit = torch.nn.functional.normalize(x[:, :20], dim=1)
    apart = (unit - unit.mean(dim=0)).square().sum(dim=1)
    expected = sum(torch.exp(-apart / (2 * 2.0**power)) for power in range(-3, 2))
    torch.testing.assert_close(typicality(x, torch.zeros(6, dtype=torch.long), 1)[0], expected)


def test_vidcom2_gives_more_to_the_frame_that_stands_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 0.05 * torch.randn(6, 20, 16, generator=generator) + torch.randn(16, generator=generator)
    x[3] = torch.randn(20, 16, generator=generator)
    selection = select("vidcom2", features=x.flatten(0, 1), grid_thw=(6, 4, 5), keep_tokens=30)
    (mask,) = selection.grid_mask(((6, 4, 5),))
    per_frame = mask.flatten(1).sum(dim=1)
    assert per_frame.sum() == 30
    assert per_frame.argmax() == 3
    assert per_frame[3] >= 2 * per_frame[[0, 1, 2, 4, 5]].max()


@pytest.mark.parametrize("budget", [1, 3, 7, 59, 60])
def test_vidcom2_is_exact_at_any_count(budget: int) -> None:
    assert select("vidcom2", features=torch.randn(60, 6), grid_thw=(5, 3, 4), keep_tokens=budget).k == budget


def test_vidcom2_goes_through_a_long_video_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    frame = torch.arange(3000) // 50
    whole = typicality(x, frame, 60)
    monkeypatch.setattr("vtc.selectors.vidcom2._BLOCK", {False: 2**13})
    monkeypatch.setattr("vtc.selectors.vidcom2._HELD", 2**10)
    for once, blocked in zip(whole, typicality(x, frame, 60), strict=True):
        torch.testing.assert_close(once, blocked)
    assert peak_bytes(lambda: typicality(x, frame, 60)) < 4 * x.numel() / 2, "no copy of all in float32"


def test_vidcom2_refuses_a_cold_softmax() -> None:
    for bad in (0.0, -1.0, True):
        with pytest.raises(ConfigError, match="temperature must be positive"):
            get_selector("vidcom2", temperature=bad)


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_differs_from_chance(method: str) -> None:
    grids = ((5, 3, 4),)
    chosen, drawn = (
        get_selector(name).select(make_context(get_selector(name), 20, grids)).keep.tolist()
        for name in (method, "random")
    )
    assert chosen != drawn
