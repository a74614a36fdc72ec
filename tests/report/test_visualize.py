"""Kept tokens are drawn where their pixels are: through crops, tiles, newlines, merged and shuffled patches.

The pictures are grey but for one patch of noise. A method that keeps the tokens with the highest pixel entropy finds it
through the model's own processing; what is drawn bright must then lie on the noise.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vtc
from tests import odd_pictures, tiny
from vtc.core.selection import Selection
from vtc.core.sites import BeforeDecoder, DecoderLayer, Site
from vtc.engine.install import engine_of
from vtc.registry import _SELECTORS, get_adapter
from vtc.report.report import Report, SegmentReport
from vtc.report.visualize import _titled, animation, save_animation
from vtc.selectors.vflowopt import PixelEntropy

GREY, NOISY = 128, 10
WIDTH, HEIGHT = 192, 128

BEFORE = BeforeDecoder()


@pytest.fixture(autouse=True, scope="module")
def busiest() -> Any:
    """A method that keeps the tokens with the most pixel entropy."""

    @vtc.register_selector
    @dataclass(frozen=True)
    class BusiestSelector(vtc.ScoreSelector):
        """Keep the tokens behind the most varied pixels."""

        name: ClassVar[str] = "busiest"
        paper: ClassVar[str] = "tests"
        requires: ClassVar[tuple[vtc.Signal, ...]] = (PixelEntropy((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),)

        def score(self, ctx: vtc.VisualContext) -> torch.Tensor:
            return ctx[PixelEntropy].float()

    yield
    _SELECTORS._classes.pop("busiest")


def picture(x: int, y: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Grey with noise around (x, y)."""
    pixels = np.full((height, width, 3), GREY, dtype=np.uint8)
    patch = pixels[max(0, y - NOISY) : y + NOISY, max(0, x - NOISY) : x + NOISY]
    patch[:] = np.random.default_rng(x).integers(0, 256, patch.shape)
    return Image.fromarray(pixels)


def bright(drawn: Image.Image) -> np.ndarray[Any, Any]:
    """(H, W) bool: grey that was not dimmed, and the noise and outlines in between."""
    return np.asarray(drawn).mean(axis=2) > 80


def processors() -> dict[str, Any]:
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    square = {"size": {"height": 32, "width": 32}}
    pinpoints = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
    tiles = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
    return {
        "llava": transformers.CLIPImageProcessor(**crop),
        "llava_next": transformers.LlavaNextImageProcessor(**crop, **pinpoints),
        "llava_onevision": transformers.LlavaOnevisionImageProcessor(**square, **pinpoints),
        "qwen2_vl": transformers.Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 48 * 48}
        ),
        "qwen2_5_vl": transformers.Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 48 * 48}
        ),
        "glm4v": transformers.Glm4vImageProcessor(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 2 * 48 * 48}
        ),
        "internvl_tiles": transformers.GotOcr2ImageProcessor(**square, crop_to_patches=True, max_patches=6),
        "idefics3": transformers.Idefics3ImageProcessor(**tiles),
        "gemma3": transformers.Gemma3ImageProcessor(**square),
    }


def reported(family: str, image: Image.Image, **config: Any) -> Report:
    """What a tiny model keeps of a real picture."""
    case = tiny.build(family)
    worker = processors()[family]
    inputs = dict(worker(images=[image], return_tensors="pt"))
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "image_sizes") if name in inputs}
    model = vtc.compress(case.model, "busiest", **config)
    with torch.no_grad():
        encoded = engine_of(model).encoded(model.model.get_image_features(**pixels, return_dict=True))
        count = len(encoded.features)
        # Tiles of Idefics3 stand apart in the prompt; the other families have one run.
        unit = encoded.layout.unit if family == "idefics3" else count
        ids = [tiny.BOS]
        for _ in range(count // unit):
            ids += [tiny.IMAGE] * unit + [5]
        given = torch.tensor([[*ids, 7, 8]])
        model(input_ids=given, attention_mask=torch.ones_like(given), **pixels, **case.architecture.extras(given))
    return vtc.report(model)


SPOTS = [(80, 48), (70, 20), (125, 100)]


@pytest.mark.parametrize("spot", SPOTS, ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "glm4v", "gemma3"])
def test_one_view_is_drawn_where_its_pixels_are(family: str, spot: tuple[int, int]) -> None:
    image = picture(*spot)
    report = reported(family, image, keep_tokens=1)
    drawn = vtc.visualize(report, image, size=WIDTH, titles=False)
    assert drawn.size == image.size
    (grid,) = report.segments[0].grids
    sees = HEIGHT if family == "llava" else WIDTH  # a centre crop of a square
    seen = bright(drawn)
    seen[:, : (WIDTH - sees) // 2] = seen[:, (WIDTH + sees) // 2 :] = False  # hatched
    rows, columns = np.nonzero(seen)
    assert abs(rows.mean() - spot[1]) <= HEIGHT / grid[1]
    assert abs(columns.mean() - spot[0]) <= sees / grid[2]
    noise = np.zeros_like(seen)
    noise[spot[1] - NOISY : spot[1] + NOISY, spot[0] - NOISY : spot[0] + NOISY] = True
    assert (seen & noise).sum() > 0.12 * noise.sum()
    assert seen.sum() < 1.3 * HEIGHT * sees / (grid[1] * grid[2])


@pytest.mark.parametrize("spot", [*SPOTS, (20, 110), (180, 15)], ids=str)
@pytest.mark.parametrize("shape", [(192, 128), (128, 192), (200, 100), (150, 150)], ids=str)
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl_tiles", "idefics3"])
def test_tiles_and_thumbnails_show_the_same_spot(family: str, shape: tuple[int, int], spot: tuple[int, int]) -> None:
    width, height = shape
    spot = spot[0] * width // WIDTH, spot[1] * height // HEIGHT
    image = picture(*spot, *shape)
    report = reported(family, image, keep_tokens=1 if family == "idefics3" else 8)
    longer = max(shape)
    drawn = vtc.visualize(report, image, size=longer, titles=False)
    panels = [drawn.crop((x, 0, x + width, height)) for x in (0, width + 6)]
    found = []
    for panel in panels:
        seen = bright(panel)
        noise = np.zeros_like(seen)
        noise[max(0, spot[1] - NOISY) : spot[1] + NOISY, max(0, spot[0] - NOISY) : spot[0] + NOISY] = True
        found.append((seen & noise).sum() > 0.12 * noise.sum())
    assert found == [True, True]


def test_tile_grids_are_those_of_the_processors() -> None:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    internvl, idefics3 = get_adapter("internvl"), get_adapter("idefics3")
    generator = np.random.default_rng(0)
    worker = transformers.Idefics3ImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    for _ in range(40):
        width, height = (int(edge) for edge in generator.integers(40, 400, 2))
        columns, rows = get_optimal_tiled_canvas((height, width), (32, 32), 1, 12)
        assert internvl.tile_grid(rows * columns, (width, height)) == (rows, columns)
        made = worker(images=[Image.new("RGB", (width, height))], return_tensors="pt", return_row_col_info=True)
        if made["rows"][0][0]:
            rows, columns = made["rows"][0][0], made["cols"][0][0]
            assert idefics3.tile_grid(rows * columns, (width, height)) == (rows, columns)


# -------------------------------------------------------------------------------------------- by hand


def by_hand(
    grids: tuple[tuple[int, int, int], ...],
    selections: tuple[tuple[Site, Selection], ...],
    modality: str = "image",
    model_type: str = "qwen2_vl",
) -> Report:
    """A report of one image or video, of a decoder of four layers."""
    n = selections[0][1].n
    kept = selections[-1][1]
    segment = SegmentReport(0, 0, modality, n, kept.k, 0, grids, selections, torch.arange(kept.k))
    return Report.build(
        configs=[vtc.CompressionConfig("uniform", keep_ratio=0.5)],
        model_type=model_type,
        text_config=transformers.LlamaConfig(num_hidden_layers=4, vocab_size=30, hidden_size=8, num_attention_heads=2),
        segments=[segment],
        lengths_before=[n],
        lengths_per_layer=[[n]] * 4,
        spent={},
        dtype=torch.float32,
        transformers_version="0",
    )


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (GREY,) * 3)


def test_each_range_of_layers_has_a_panel() -> None:
    first = Selection(16, torch.arange(8))
    second = Selection(8, torch.tensor([0, 1]))
    report = by_hand(((1, 4, 4),), ((BEFORE, first), (DecoderLayer(2), second)))
    drawn = vtc.visualize(report, grey(64, 64), size=64, titles=False)
    assert drawn.size == (64 + 6 + 64, 64)
    before, after = bright(drawn.crop((0, 0, 64, 64))), bright(drawn.crop((70, 0, 134, 64)))
    assert before[:32].all()
    assert not before[32:].any()
    assert after[:16, :32].all()
    assert after.sum() == 16 * 32
    titled = vtc.visualize(report, grey(64, 64), size=64)
    assert titled.height == 64 + 20


def test_merged_tokens_have_the_colour_of_their_anchor() -> None:
    assign = torch.tensor([0, 0, 1, -1])
    report = by_hand(((1, 2, 2),), ((BEFORE, Selection(4, torch.tensor([0, 2]), assign)),))
    pixels = np.asarray(vtc.visualize(report, grey(40, 40), size=40, titles=False)).astype(int)
    centre = {name: pixels[y, x] for name, (x, y) in {"anchor": (10, 10), "merged": (30, 10), "gone": (30, 30)}.items()}
    assert (centre["anchor"] == GREY).all()
    assert np.ptp(centre["gone"]) == 0
    assert centre["gone"].max() < 50
    assert np.ptp(centre["merged"]) > 30
    outline = pixels[10, 19]
    assert np.argmax(outline) == np.argmax(centre["merged"])
    assert (pixels[30, 10] == GREY).all()  # kept without company: no colour
    assert np.ptp(pixels[30, 19]) == 0
    assert pixels[30, 19].max() > GREY


def test_what_the_model_never_saw_is_hatched() -> None:
    report = by_hand(((1, 2, 2),), ((BEFORE, Selection.full(4)),), model_type="llava")
    pixels = np.asarray(vtc.visualize(report, grey(80, 40), size=80, titles=False))
    assert len(np.unique(pixels[:, 5:15])) == 2
    assert (pixels[10, 30] == GREY).all()
    stretched = np.asarray(vtc.visualize(report, grey(80, 40), size=80, titles=False, fit="stretch"))
    assert (stretched[5:15, 5:15] == GREY).all()
    padded = np.asarray(
        vtc.visualize(
            by_hand(((1, 2, 2),), ((BEFORE, Selection(4, torch.tensor([0]))),)),
            grey(80, 40),
            size=80,
            fit="pad",
            titles=False,
        )
    )
    assert bright(Image.fromarray(padded))[:20, :40].all()  # a padded cell of 40 x 40 of which half is picture
    assert bright(Image.fromarray(padded)).sum() == 20 * 40


def test_a_processor_says_how_it_crops() -> None:
    class Worker:
        image_processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": 40}, crop_size={"height": 20, "width": 20}
        )

    report = by_hand(((1, 2, 2),), ((BEFORE, Selection.full(4)),), model_type="llava")
    pixels = np.asarray(vtc.visualize(report, grey(80, 40), size=80, titles=False, processor=Worker()))
    inside = (pixels == GREY).all(axis=2)
    assert inside[12:28, 32:48].all()
    assert not inside[:9].any()
    assert not inside[:, :29].any()


@pytest.mark.parametrize(("frames", "per_token"), [(4, 1), (8, 2), (7, 2)])
def test_frames_make_a_sheet_and_a_strip(frames: int, per_token: int, tmp_path: Path) -> None:
    keep = torch.tensor([4])  # the first cell of the second step in time
    report = by_hand(((4, 2, 2),), ((BEFORE, Selection(16, keep)),), modality="video")
    shown = [grey(20, 20) for _ in range(frames)]
    strip = animation(report, shown, size=20, titles=False)
    assert len(strip) == frames
    lit = [place for place, frame in enumerate(strip) if bright(frame)[:10, :10].all()]
    assert lit == list(range(per_token, 2 * per_token))
    sheet = vtc.visualize(report, np.stack([np.asarray(frame) for frame in shown]), size=20, titles=False, columns=3)
    assert sheet.size == (3 * 20 + 2 * 6, -(-frames // 3) * 26 - 6)
    assert bright(sheet)[:10, 26 * per_token % 78 : 26 * per_token % 78 + 10].all()
    for name in ("kept.gif", "kept.webp"):
        save_animation(strip, tmp_path / name)
        with Image.open(tmp_path / name) as read:
            assert read.n_frames >= 2


def test_pictures_are_drawn_as_the_processor_saw_them(tmp_path: Path) -> None:
    """Processors do not turn pictures, so the drawing must not: patches would stand elsewhere."""
    path = odd_pictures.write(tmp_path / "photo.png")
    report = by_hand(((1, 2, 2),), ((BEFORE, Selection.full(4)),), model_type="qwen2_vl")
    upright = vtc.visualize(report, vtc.open_image(path), size=32, titles=False)
    assert upright.size == odd_pictures.SIZE
    with Image.open(path) as opened:
        lying = vtc.visualize(report, opened, size=32, titles=False)
    assert lying.size == odd_pictures.SIZE[::-1]
    assert lying.getpixel((28, 12)) == upright.getpixel((12, 28)) == (128, 128, 128), "16 bits are not white"


def test_titles_fit_above_what_they_name() -> None:
    long, short = (_titled(grey(60, 10), parts) for parts in (("frame 12", "3 of 64"), ("3 of 64",)))
    assert np.array_equal(np.asarray(long), np.asarray(short))
    smaller = np.asarray(_titled(grey(100, 10), ("frame 12", "same 3 of 64, and more")))
    assert (smaller[:20] < 200).any()
    assert (smaller[:20, -1] == 255).all()
    assert _titled(grey(60, 10), ()).size == (60, 10)


def test_layers_stand_once_above_a_sheet_and_joined_frames_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    module = sys.modules["vtc.report.visualize"]  # the package shows the function of that name
    monkeypatch.setattr(module, "_titled", lambda panel, parts: written.append(", ".join(parts)) or panel)
    keep = torch.tensor([4])
    report = by_hand(
        ((2, 2, 2),), ((BEFORE, Selection.full(8)), (DecoderLayer(1), Selection(8, keep))), modality="video"
    )
    vtc.visualize(report, [grey(20, 20)] * 4, size=20)
    first = ["frame 0, 4 of 4", "frame 1, same 4 of 4", "frame 2, 4 of 4", "frame 3, same 4 of 4"]
    then = ["frame 0, 0 of 4", "frame 1, same 0 of 4", "frame 2, 1 of 4", "frame 3, same 1 of 4"]
    assert written == [*first, *then, "layer 0", "layers 1-3"]


def test_panels_together_have_a_limit_too() -> None:
    steps = 100
    report = by_hand(((steps, 2, 2),), ((BEFORE, Selection.full(4 * steps)),), modality="video")
    message = r"100 panels of size 2000 are 400,000,000 pixels, .* at most 268,435,456 \(MAX_DRAWN_PIXELS\)"
    with pytest.raises(vtc.ConfigError, match=message):
        vtc.visualize(report, [grey(20, 20)] * steps, size=2000)
    with pytest.raises(vtc.ConfigError, match=message):
        animation(report, [grey(20, 20)] * steps, size=2000)


def test_slow_and_fast_animations_are_written(tmp_path: Path) -> None:
    for fps, milliseconds in ((0.01, 100_000), (100, 10)):
        save_animation([grey(4, 4), picture(2, 2, 4, 4)], tmp_path / "kept.gif", fps)
        with Image.open(tmp_path / "kept.gif") as read:
            assert read.info["duration"] == milliseconds


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    report = by_hand(((4, 2, 2),), ((BEFORE, Selection.full(16)),), modality="video")
    with pytest.raises(vtc.InputError, match="4 steps in time, which 3 frames"):
        vtc.visualize(report, [grey(20, 20)] * 3)
    with pytest.raises(vtc.InputError, match="nothing about row 2"):
        vtc.visualize(report, [grey(20, 20)] * 4, row=2)
    with pytest.raises(vtc.InputError, match="no pictures"):
        vtc.visualize(report, [])
    with pytest.raises(vtc.InputError, match="uint8"):
        vtc.visualize(report, np.zeros((4, 4, 3)))
    with pytest.raises(vtc.ConfigError, match="fit must be"):
        vtc.visualize(report, [grey(20, 20)] * 4, fit="zoom")
    image = by_hand(((1, 2, 2),), ((BEFORE, Selection.full(4)),))
    with pytest.raises(vtc.InputError, match="1 images, but 2 pictures"):
        vtc.visualize(image, [grey(20, 20)] * 2)
    with pytest.raises(vtc.InputError, match="2 views"):
        vtc.visualize(by_hand(((1, 2, 2), (1, 1, 1)), ((BEFORE, Selection.full(5)),)), grey(20, 20))
    for size in (100_000, 4097, 15, 0, -1, 10.5, True):
        with pytest.raises(vtc.ConfigError, match=r"size must be an integer from 16 to 4,096, got"):
            vtc.visualize(image, grey(20, 20), size=size)  # type: ignore[arg-type]
        with pytest.raises(vtc.ConfigError, match=r"size must be an integer from 16 to 4,096, got"):
            animation(report, [grey(20, 20)] * 4, size=size)  # type: ignore[arg-type]
    for columns in (0, 10**9):
        with pytest.raises(vtc.ConfigError, match="columns must be an integer from 1 to 100,000"):
            vtc.visualize(image, grey(20, 20), columns=columns)
    for fps in (0, -1.0, 1e9, 1e-9, float("nan"), float("inf")):
        with pytest.raises(vtc.ConfigError, match=r"fps must lie from 0\.01 to 100"):
            save_animation([grey(2, 2)], tmp_path / "kept.gif", fps)
    with pytest.raises(vtc.InputError, match=r"kept\.gif: there are no pictures"):
        save_animation([], tmp_path / "kept.gif")
    with pytest.raises(vtc.ConfigError, match="written as"):
        save_animation([grey(2, 2)], tmp_path / "kept.bmp")
