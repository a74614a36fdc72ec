"""Methods that compare tokens with the text: their authors' numbers, and by hand; see tests/golden/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.selectors.test_golden import GOLDEN, load
from vtc import kernels
from vtc.core.observations import TokenGrids
from vtc.errors import ConfigError, InputError
from vtc.functional import select
from vtc.registry import get_selector
from vtc.selectors import EadpSelector
from vtc.selectors.eadp import dense_relevance, smoothed
from vtc.selectors.text_relevance import relevance_to_text


def golden_files(pattern: str) -> list[str]:
    return sorted(path.name for path in Path(GOLDEN).glob(pattern))


# --- rediprune -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden_files("rediprune_*.npz") or ["missing"])
def test_rediprune(name: str) -> None:
    golden = load(name)
    budget = max(1, round(len(golden["vision"]) * golden["keep_ratio"]))
    selection = select(
        "rediprune",
        features=golden["vision"],
        text_embeds=golden["text"][None],
        keep_tokens=budget,
        alpha=golden["alpha"],
        tau=golden["tau"],
    )
    assert torch.equal(selection.keep, golden["selected_sorted"])


def test_rediprune_leaves_out_what_the_text_does_not_mean() -> None:
    relevance = torch.tensor([0.9, 0.5, 0.3, 0.2, -0.2, -0.9])
    x = torch.stack([relevance, (1 - relevance**2).sqrt()], dim=1)
    options = {"features": x, "text_embeds": torch.tensor([[1.0, 0.0]]), "alpha": 0.0}
    assert select("rediprune", keep_tokens=2, **options).keep.tolist() == [0, 5]
    assert select("rediprune", keep_tokens=1, tau=1.0, **options).keep.tolist() == [0]
    assert select("rediprune", keep_tokens=2, tau=0.01, **options).keep.tolist() == [0, 5], "all of six are candidates"
    assert select("rediprune", keep_tokens=3, tau=0.4, **options).keep.tolist() == [0, 1, 2], "two are not enough"
    assert select("rediprune", keep_tokens=3, tau=0.1, **options).keep.tolist() == [0, 1, 3]
    assert select("rediprune", keep_tokens=5, tau=0.1, **options).keep.tolist() == [0, 1, 2, 3, 4]
    twelve = {**options, "features": torch.cat([x, -x])}
    assert select("rediprune", keep_tokens=2, **twelve).keep.tolist() == [0, 6], "the opposite"
    assert select("rediprune", keep_tokens=2, tau=0.9, **twelve).keep.tolist() == [0, 10], "of the six most relevant"


def test_rediprune_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [-1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0]])
    options = {"features": x, "text_embeds": text}
    # Token 0 is the text. The opposite is at distance 2, and counts -0.5; the next at 1, and counts nothing.
    assert select("rediprune", keep_tokens=2, **options).keep.tolist() == [0, 3]
    assert select("rediprune", keep_tokens=2, alpha=1.5, **options).keep.tolist() == [0, 2], "relevance before distance"
    assert select("rediprune", keep_tokens=2, alpha=0, **options).keep.tolist() == [0, 3]
    assert select("rediprune", keep_tokens=3, **options).keep.tolist() == [0, 1, 3]


# --- mmtok -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden_files("mmtok_*.npz") or ["missing"])
def test_mmtok(name: str) -> None:
    golden = load(name)
    selection = select(
        "mmtok",
        features=golden["vision"],
        pre_projector=golden["vision_clip"],
        text_embeds=golden["text"],
        keep_tokens=golden["k"],
        alpha=golden["alpha"],
        text_temperature=golden["tv_temp"],
        temperature=golden["vv_temp"],
    )
    assert torch.equal(selection.keep, golden["selected_sorted"])


def test_mmtok_by_hand() -> None:
    x = torch.eye(4)
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    options = {"features": x, "pre_projector": z}
    assert select("mmtok", keep_tokens=1, text_embeds=text, **options).keep.tolist() == [2], "what the text says"
    # Three look for each other, and one for itself.
    pair = select("mmtok", keep_tokens=2, text_embeds=text, alpha=100, temperature=0.02, **options)
    assert pair.keep.tolist() == [2, 3], "of equals the one that the text says"
    assert kernels.multimodal_coverage(x, 2, text[:0], z, 1.0, 0.01, 0.02).tolist() == [0, 3], "without a text"


# --- eadp ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden_files("eadp_*.npz") or ["missing"])
def test_eadp(name: str) -> None:
    golden = load(name)
    high, wide = golden["grid"].tolist()
    (x,), (text,), whole = golden["vision"], golden["text_tokens"], golden["text_global"]
    selector = EadpSelector(alpha=golden["alpha"], beta=golden["beta"])
    origin = TokenGrids(((1, high, wide),)).origin()
    importance = selector.importance(x, text, relevance_to_text(x, whole), origin)
    torch.testing.assert_close(importance, golden["importance"][0], rtol=1e-4, atol=1e-5)
    picks = kernels.weighted_coverage(x, golden["k"], importance)
    assert torch.equal(picks, golden["selected_in_order"])
    importance = selector.importance(x, text, relevance_to_text(x, text), origin)
    selection = select("eadp", features=x, text_embeds=text, grid_thw=(1, high, wide), keep_tokens=12)
    assert torch.equal(selection.keep, kernels.weighted_coverage(x, 12, importance).sort().values)


def test_eadp_words_that_mean_a_place() -> None:
    x = torch.eye(5)
    vague, clear = torch.ones(5), torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    text = torch.stack([vague, clear, vague, vague, vague])
    torch.testing.assert_close(dense_relevance(x, text, 0.2), clear)
    torch.testing.assert_close(dense_relevance(x, text, 0.2, sign=-1.0), -clear)
    assert not dense_relevance(x, text[:0], 0.2).any()


def test_eadp_alpha_is_the_weight_of_the_text_as_a_whole() -> None:
    x, text = torch.eye(4), torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.3, 0.3, 0.3]])
    origin, whole = TokenGrids(((1, 1, 1),) * 4).origin(), torch.tensor([0.0, 0.0, 1.0, 0.0])
    for alpha, best in ((0.0, 0), (1.0, 2)):
        importance = EadpSelector(alpha=alpha, similarity="direct").importance(x, text, whole, origin)
        assert int(importance.argmax()) == best


def test_eadp_smooths_within_a_frame() -> None:
    """One peak in the corner of the first of two frames: mirrored, the corner counts its neighbours twice."""
    side, middle = 0.27406862, 0.45186276
    values = torch.zeros(2, 3, 4)
    values[0, 0, 0] = 1.0
    origin = TokenGrids(((2, 3, 4),)).origin()
    found = smoothed(values.flatten(), origin).view(2, 3, 4)
    assert not found[1].any()
    torch.testing.assert_close(found[0, 0, 0], torch.tensor(middle**2))
    torch.testing.assert_close(found[0, 0, 1], torch.tensor(side * middle))
    torch.testing.assert_close(found[0, 1, 1], torch.tensor(side**2))
    padded = F.pad(torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(0)), (1, 1, 1, 1), mode="reflect")
    edge = torch.tensor([side, middle, side])
    expected = F.conv2d(padded, torch.outer(edge, edge)[None, None])[0, 0]
    ours = smoothed(padded[0, 0, 1:-1, 1:-1].flatten(), TokenGrids(((1, 5, 6),)).origin())
    torch.testing.assert_close(ours.view(5, 6), expected)
    left = torch.tensor([0, 2, 5])  # of a row of six, without its neighbours nothing changes
    alone = smoothed(torch.tensor([1.0, 2.0, 3.0]), TokenGrids(((1, 1, 6),)).origin()[left])
    assert alone.tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_eadp_power_and_sign() -> None:
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    text = torch.tensor([[1.0, 0.0]])
    for similarity, kept in (("direct", 0), ("inverted", 2)):
        options = {"features": x, "text_embeds": text, "similarity": similarity, "beta": 4.0}
        keep = select("eadp", keep_tokens=1, grid_thw=[(1, 1, 1)] * 4, **options).keep.tolist()
        assert keep[0] // 2 == kept // 2, similarity


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rediprune", "mmtok", "eadp"])
def test_text_and_features_are_equally_wide(method: str) -> None:
    signals = {"text_embeds": torch.zeros(2, 3)}
    if method == "mmtok":
        signals["pre_projector"] = torch.zeros(6, 5)
    with pytest.raises(InputError, match="text_embeds are 3 wide and the features 4"):
        select(method, features=torch.zeros(6, 4), keep_tokens=3, **signals)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rediprune", {"alpha": -1.0}),
        ("rediprune", {"tau": 1.5}),
        ("mmtok", {"alpha": -1.0}),
        ("mmtok", {"text_temperature": 0.0}),
        ("mmtok", {"temperature": 0.01}),
        ("eadp", {"alpha": 1.5}),
        ("eadp", {"beta": -1.0}),
        ("eadp", {"words": 2.0}),
        ("eadp", {"similarity": "none"}),
    ],
)
def test_refuses_options(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{method}: {next(iter(options))}"):
        get_selector(method, **options)
