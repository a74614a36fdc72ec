"""`pixelrefer`: regions that users mark, object tokens inside unmodified models, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests import learned, tiny
from tests.selectors.test_golden import load
from vtc.core.regions import Region
from vtc.engine.install import engine_of
from vtc.errors import ConfigError, InputError
from vtc.selectors.learned.pixelrefer import position_grid
from vtc.selectors.learned.pixelrefer.module import grouped

SIZE = (32, 32)
"""What the user's pictures are said to measure; the tiny LLaVA has 4 x 4 tokens."""

BOX = (0.0, 8.0, 24.0, 24.0)
INSIDE = [4, 5, 6, 8, 9, 10]


@pytest.fixture
def case() -> tiny.TinyCase:
    return tiny.build("llava")


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).logits


def test_positions_are_the_authors() -> None:
    golden = load("pixelrefer_position_01.npz")
    box, size = tuple(golden["box"].tolist()), (int(golden["raw_w"]), int(golden["raw_h"]))
    found = position_grid((int(golden["h"]), int(golden["w"])), box, size)
    torch.testing.assert_close(found, golden["position"].float(), rtol=1e-4, atol=1e-5)


def test_cells_are_those_of_the_crop() -> None:
    """The corners that tokens are told are the authors' positions, with the crop along the edges of tokens."""
    cells = Region((32, 48), (8.0, 12.0, 24.0, 36.0)).cells((4, 4), "stretch").unflatten(0, (4, 4))
    assert torch.equal(cells[..., 0], torch.tensor([[0.0] * 4, [0.0, 1, 1, 0], [0.0, 1, 1, 0], [0.0] * 4]))
    expected = position_grid((2, 2), (8.0, 12.0, 24.0, 36.0), (32, 48))
    torch.testing.assert_close(cells[1:3, 1:3, 1:], expected)


def test_boxes_and_masks_agree() -> None:
    assert Region((40, 24), (0, 0, 8, 24), fit="crop").cells((2, 2), "stretch")[:, 0].sum() == 0, "it is cut off"
    mask = torch.zeros(24, 40, dtype=torch.bool)
    mask[3:17, 10:34] = True
    box = Region((40, 24), (10.0, 3.0, 34.0, 17.0))
    marked = Region((40, 24), box.box, mask)
    for fit in ("stretch", "crop", "pad"):
        torch.testing.assert_close(marked.cells((8, 8), fit), box.cells((8, 8), fit), rtol=1e-5, atol=1e-6)
    assert marked.cells((8, 8), "stretch")[:, 0].sum() == pytest.approx(14 * 24 / (24 * 40) * 64)
    # The square in the middle shows columns 8 to 32; the one around it begins 8 rows above the picture.
    assert float(marked.cells((1, 1), "crop")[0, 0]) == pytest.approx(14 * 22 / 24**2)
    assert float(marked.cells((1, 1), "pad")[0, 0]) == pytest.approx(14 * 24 / 40**2)


def test_alike_tokens_share_a_group() -> None:
    centres = 5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    groups = grouped(centres.repeat(10, 1) + noise, 4, 5).view(10, 4)
    assert (groups == groups[0]).all()
    assert groups[0].unique().numel() == 4
    assert grouped(torch.ones(6, 3), 4, 3).unique().numel() == 1, "tokens that are equal"


@pytest.mark.parametrize("modules", [False, True])
def test_a_region_that_fits_is_as_if_only_it_were_left(case: tiny.TinyCase, tmp_path: Path, modules: bool) -> None:
    """Without modules, and with modules before training, whose projector is a copy."""
    options = {"modules": learned.pixelrefer(case.model, tmp_path, scale=0.0)} if modules else {}
    inputs = case.batch("single")
    columns = (inputs["input_ids"][0] == case.model.config.image_token_id).nonzero()[:, 0]
    mask = inputs["attention_mask"].clone()
    mask[0, columns] = 0
    mask[0, columns[INSIDE]] = 1
    order = torch.arange(mask.shape[1])[None]
    with torch.no_grad():
        expected = case.model(**{**inputs, "attention_mask": mask}, position_ids=order).logits
    vtc.compress(case.model, "pixelrefer", keep_tokens=16, **options)
    with vtc.regions([BOX], SIZE):
        found = logits(case.model, inputs)
    (segment,) = vtc.report(case.model).segments
    assert segment.kept.tolist() == INSIDE
    text = torch.ones(mask.shape[1], dtype=torch.bool)
    text[columns] = False
    torch.testing.assert_close(found[0, text], expected[0, text], rtol=1e-4, atol=2e-5)


def test_a_smaller_budget_groups_alike_tokens(case: tiny.TinyCase) -> None:
    features = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    with vtc.regions([BOX], SIZE):
        found = vtc.select("pixelrefer", features=features, grid_thw=(1, 4, 4), keep_tokens=2)
    assert found.k == 2
    assert set(found.keep.tolist()) <= set(INSIDE)
    x = features[INSIDE]
    groups = grouped(x, 2, 3)
    means = torch.stack([x[groups == group].mean(dim=0) for group in groups.unique()])
    nearest = [INSIDE[int((x - mean).norm(dim=1).argmin())] for mean in means]
    for place, tokens in zip(found.keep.tolist(), found.features, strict=True):
        torch.testing.assert_close(tokens, means[nearest.index(place)])


def test_a_batch_equals_its_rows(case: tiny.TinyCase, tmp_path: Path) -> None:
    vtc.compress(case.model, "pixelrefer", modules=learned.pixelrefer(case.model, tmp_path), keep_tokens=4)
    pictures = len(vtc_segments(case))
    marks = [BOX, None, torch.eye(32), (1, 1, 5, 30)][:pictures]
    with vtc.regions(marks, [SIZE] * pictures):
        together = case.model.generate(**case.batch("ragged"), max_new_tokens=3, do_sample=False)
    first = 0
    for row, inputs in enumerate(case.rows("ragged")):
        count = len(inputs["pixel_values"])
        with vtc.regions(marks[first : first + count], [SIZE] * count):
            alone = case.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        first += count
        assert torch.equal(alone[0, -3:], together[row, -3:])


def vtc_segments(case: tiny.TinyCase) -> list[Any]:
    """Give the pictures of the ragged batch."""
    with vtc.compressed(case.model, "uniform", keep_tokens=4):
        logits(case.model, case.batch("ragged"))
        return list(vtc.report(case.model).segments)


def test_modules_save_load_and_learn(case: tiny.TinyCase, tmp_path: Path) -> None:
    prompts = case.rows("single")
    before = logits(case.model, prompts[0])
    settings = {"steps": 2, "batch": 1, "rate": 1e-2, "progress": False, "heads": 4}
    marks = [[torch.eye(32)]] * len(prompts)
    folder = vtc.train(case.model, None, prompts, "pixelrefer", tmp_path / "made", regions=marks, **settings)
    vtc.compress(case.model, "pixelrefer", modules=str(folder), keep_tokens=4)
    with vtc.regions(marks[0]):
        first = logits(case.model, prompts[0])
    selector = engine_of(case.model).plan.stages[0].selector
    assert {weight.dtype for weight in selector.module.parameters()} == {torch.float32}
    assert selector.module.around.out_proj.weight.abs().max() > 0, "it has learnt"
    vtc.selectors.learned.save_modules(tmp_path / "again", selector.made_for, selector.module)
    vtc.compress(case.model, "pixelrefer", modules=str(tmp_path / "again"), keep_tokens=4)
    with vtc.regions(marks[0]):
        assert torch.equal(logits(case.model, prompts[0]), first)
    vtc.restore(case.model)
    assert torch.equal(logits(case.model, prompts[0]), before)
    with pytest.raises(InputError, match="sample 0: region 0: the mask is empty"):
        vtc.train(case.model, None, prompts, "pixelrefer", tmp_path / "no", regions=[[torch.zeros(4, 4)]], **settings)


def test_keeping_everything_replaces_nothing(case: tiny.TinyCase) -> None:
    before = logits(case.model, case.batch("single"))
    vtc.compress(case.model, "pixelrefer", keep_ratio=1.0)
    assert torch.equal(logits(case.model, case.batch("single")), before)


@pytest.mark.parametrize(
    ("marked", "sizes", "said"),
    [
        ([(0, 0, 5, 5)], None, "is a box, so the size of its picture is needed"),
        ([(5, 0, 5, 5)], SIZE, "must have an area and lie in its picture of 32 x 32 pixels"),
        ([(0, 0, 33, 5)], SIZE, "must have an area and lie in its picture"),
        ([(0, 0, float("nan"), 5)], SIZE, "must have an area"),
        ([(0, 0, 5)], SIZE, r"must be a box .*; got the shape \(3,\)"),
        (["left"], SIZE, "must be a box of four numbers, a mask or None"),
        ([torch.zeros(8, 8)], None, "the mask is empty"),
        ([torch.ones(8, 8)], SIZE, "the mask is 8 x 8 pixels, its picture 32 x 32"),
        ([None], [SIZE, SIZE], "there are 1 regions, but the sizes of 2 pictures"),
        ([(0, 0, 1, 1)], ["big"], r"must be a picture or its \(width, height\)"),
        ("box", SIZE, "a list with one entry for every picture"),
    ],
)
def test_wrong_regions_are_named(marked: Any, sizes: Any, said: str) -> None:
    with pytest.raises(InputError, match=said), vtc.regions(marked, sizes):
        pass


def test_wrong_prompts_are_named(case: tiny.TinyCase) -> None:
    inputs = case.batch("two_images")
    vtc.compress(case.model, "pixelrefer", keep_tokens=4)
    with pytest.raises(InputError, match=r"Run the model inside vtc.regions"):
        logits(case.model, inputs)
    with pytest.raises(InputError, match="1 regions, but the prompt has 4 pictures"), vtc.regions([BOX], SIZE):
        logits(case.model, inputs)
    wide = torch.zeros(10, 40)
    wide[:, :4] = 1
    with pytest.raises(InputError, match="in the margin of its picture"), vtc.regions([wide, None, None, None]):
        logits(case.model, inputs)
    vtc.compress(case.model, "uniform", keep_tokens=4)
    with pytest.raises(InputError, match="no method of this compression reads them"), vtc.regions([None] * 4):
        logits(case.model, inputs)
    with pytest.raises(InputError, match="given 2 regions"), vtc.regions([BOX, None], SIZE):
        vtc.select("pixelrefer", features=torch.ones(16, 4), grid_thw=(1, 4, 4), keep_tokens=2)
    with pytest.raises(InputError, match="one grid of tokens"), vtc.regions([None]):
        vtc.select("pixelrefer", features=torch.ones(32, 4), grid_thw=[(1, 4, 4)] * 2, keep_tokens=2)


def test_wrong_options_are_named(case: tiny.TinyCase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fit must be crop, pad or stretch"), vtc.regions([None], fit="squeeze"):
        pass
    with pytest.raises(ConfigError, match='variant="full" puts object tokens beside all tokens'):
        vtc.compress(case.model, "pixelrefer", keep_tokens=4, variant="full")
    with pytest.raises(ConfigError, match='must be "lite"'):
        vtc.compress(case.model, "pixelrefer", keep_tokens=4, variant="heavy")
    folder = learned.pixelrefer(case.model, tmp_path)
    with pytest.raises(ConfigError, match="trained for the family llava"):
        vtc.compress(tiny.build("internvl").model, "pixelrefer", modules=folder, keep_tokens=4)
