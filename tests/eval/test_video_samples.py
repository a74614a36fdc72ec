"""Samples with videos: which frames are shown, how a model is asked about them, and what becomes of broken files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pandas")
pytest.importorskip("av", reason="clips are written with PyAV")

import vtc
from eval import models, results_log, runner, tables
from eval.bounds import TruthSelector, regridded
from eval.models import Loaded
from eval.results_log import ResultsLog
from eval.runs import BLIND, FULL, Run
from eval.tasks import Sample, Task, get_task
from eval.tasks.base import Truth
from eval.tasks.generated import _ends_first
from eval.tasks.video import VideoSource
from tests import odd_pictures, tiny
from tests.tiny_processors import VIDEO_FAMILIES, processor
from tests.video import clips
from vtc import reference


@pytest.fixture(scope="module")
def file(tmp_path_factory: Any) -> Path:
    return clips.write(tmp_path_factory.mktemp("videos") / "clip.mp4", clips.frames(16), fps=4)


def load(family: str) -> Loaded:
    torch.manual_seed(0)
    made = processor(family)
    made.tokenizer.padding_side = "left"
    return Loaded(tiny.build(family).model, made, family, "tiny")


# ------------------------------------------------------------------------------------------------------------- frames


def test_frames_are_spread_evenly(file: Path) -> None:
    shown = VideoSource(file, 4)()
    assert shown.indices == (2, 6, 10, 14)
    assert [clips.number(frame) for frame in shown.frames] == [2, 6, 10, 14]
    assert (shown.fps, shown.total) == (pytest.approx(4.0), 16)
    assert VideoSource(file, 99)().indices == tuple(range(16)), "there are no more"


def test_a_folder_of_pictures_is_a_video(tmp_path: Path) -> None:
    for index, frame in enumerate(clips.frames(9)):
        Image.fromarray(frame).save(tmp_path / f"{index:05d}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    shown = VideoSource(tmp_path, 3)()
    assert [clips.number(frame) for frame in shown.frames] == list(shown.indices) == [1, 4, 7]
    assert (shown.fps, shown.total) == (3.0, 9)
    (tmp_path / "00004.png").write_bytes(b"no picture")
    with pytest.raises(vtc.InputError, match=r"00004\.png.*not a picture"):
        VideoSource(tmp_path, 3)()
    with pytest.raises(vtc.InputError, match="no pictures"):
        VideoSource(tmp_path.parent / tmp_path.name / "..", 3)()


def test_a_folder_of_pictures_is_upright_and_of_one_size(tmp_path: Path) -> None:
    for index in range(3):
        odd_pictures.write(tmp_path / f"{index}.png")
    assert all(odd_pictures.is_right(frame) for frame in VideoSource(tmp_path, 2)().frames)
    Image.new("RGB", (5, 5)).save(tmp_path / "1.png")
    with pytest.raises(vtc.InputError, match="the pictures in this folder differ in size"):
        VideoSource(tmp_path, 3)()


# -------------------------------------------------------------------------------------------------------------- runner


@dataclass(frozen=True)
class Files(Task):
    name: ClassVar[str] = "files"
    modality: ClassVar[str] = "video"
    licence: ClassVar[str] = "none"
    source: ClassVar[str] = "the test"
    layout: ClassVar[str] = "videos"
    max_new_tokens: ClassVar[int] = 2
    frames: int = 4

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        assert folder is not None
        return [
            Sample(path.stem, "what happens in the clip ?", video=VideoSource(path, self.frames))
            for path in sorted(folder.iterdir())
        ]

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"score": float(len(prediction))}


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_every_family_is_asked_about_videos(family: str, tmp_path: Path) -> None:
    """Whole and half the tokens; a short file among long ones goes in a batch of its own; a broken one is a row."""
    loaded = load(family)
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, count in (("a", 16), ("b", 16), ("c", 2), ("e", 16)):
        clips.write(videos / f"{name}.mp4", clips.frames(count, 64, 64), fps=4)
    (videos / "d.mp4").write_bytes(b"nothing")
    runs = [FULL, BLIND, Run("uniform", 0.5)]
    task = Files()
    with ResultsLog(tmp_path / "rows.jsonl", {}, {}) as rows:
        runner.answer_samples(loaded, task, task.samples(videos), runs, rows, batch_size=5, progress=False)
    rows = results_log.read(tmp_path)[1]
    frame = tables.summary(rows, runs, task)
    assert frame["n"].tolist() == [4, 4, 4]
    assert frame["broken"].tolist() == [1, 1, 1]
    assert all("d.mp4: cannot be read as a video" in row["error"] for row in rows if "error" in row)
    assert frame["kept"].tolist()[:2] == [1.0, 0.0]
    assert frame["kept"][2] == pytest.approx(0.5, abs=0.05)
    good = {(row["run"], row["sample"]): row for row in rows if "error" not in row}
    # The batch does not matter, and the frames do.
    with ResultsLog(tmp_path / "alone.jsonl", {}, {}) as alone:
        runner.answer_samples(loaded, task, task.samples(videos), runs, alone, batch_size=1, progress=False)
    for row in alone.rows:
        if "error" not in row:
            batched = good[row["run"], row["sample"]]
            assert row["kl"] == pytest.approx(batched["kl"], abs=1e-3)
    assert all(good["blind", name]["kl"] > 0 for name in "abce")


def test_frames_and_their_times_reach_the_processor(file: Path) -> None:
    loaded = load("qwen2_5_vl_video")
    sample = Sample("1", "what happens in the clip ?", video=VideoSource(file, 3))
    encoded = models.inputs(loaded, [sample], [sample.open()])
    assert encoded["video_grid_thw"][0, 0] == 2, "three frames are two steps, the last one half full"
    # Three frames of 4 s are 4/3 s apart, and there are two to a step.
    assert float(encoded["second_per_grid_ts"][0]) == pytest.approx(8 / 3)
    single = Sample("1", "what happens in the clip ?", video=VideoSource(file, 1))
    assert models.inputs(loaded, [single], [single.open()])["video_grid_thw"][0, 0] == 1


def test_a_model_without_videos_is_refused(file: Path) -> None:
    loaded = Loaded(None, object(), "some/folder", "none")
    models.check_modality(loaded, "image")
    with pytest.raises(vtc.UnsupportedModelError, match=r"some/folder: object takes no videos"):
        models.check_modality(loaded, "video")


def test_a_broken_video_names_sample_and_file(tmp_path: Path) -> None:
    sample = Sample("7", "?", video=VideoSource(tmp_path / "gone.mp4", 2))
    with pytest.raises(vtc.InputError, match=r"sample 7: .*gone\.mp4: no such file"):
        sample.open()


# ------------------------------------------------------------------------------------------------------------- floors


@pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")
def test_blind_answers_do_not_depend_on_the_picture() -> None:
    loaded = models.load("reference")
    samples = get_task("scenes", pictures=6, per_picture=4).samples(None)
    pictures = [sample.open() for sample in samples]
    blind = [models.answer(loaded, models.blinded(models.inputs(loaded, [samples[0]], [p])), 6) for p in pictures]
    assert len({texts[0] for texts, _ in blind}) == 1
    assert all(torch.equal(logp, blind[0][1]) for _, logp in blind)
    seen = [models.answer(loaded, models.inputs(loaded, [samples[0]], [p]), 6)[1] for p in pictures]
    assert not all(torch.equal(logp, seen[0]) for logp in seen)


def test_nothing_to_blind_is_an_error() -> None:
    with pytest.raises(vtc.UnsupportedModelError, match="no pixels among input_ids"):
        models.blinded({"input_ids": torch.zeros(1, 1)})


# --------------------------------------------------------------------------------------------------------------- clips


def test_clips_are_a_task_with_bounds() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    task = get_task("clips", pictures=3)
    samples = task.samples(None)
    assert len({sample.id for sample in samples}) == len(samples) >= 9
    sample = samples[0]
    shown = sample.open().video
    assert shown is not None
    total = len(shown.frames) // 2 * 64
    assert task.score(sample, sample.target) == {"exact": 1.0}
    assert task.score(sample, "not this") == {"exact": 0.0}
    truth = task.truth(sample)
    assert truth.grid == (total // 64, 8, 8)
    owned = {cell for cells in truth.things for cell in cells}
    one_each = kept(truth, len(truth.things))
    assert one_each == sorted(cells[0] for cells in truth.things)
    assert owned <= set(kept(truth, len(owned)))
    others = kept(truth, total // 4, first=False)
    assert len(others) == total // 4
    assert not owned & set(others)
    with pytest.raises(vtc.ConfigError, match="photos does not know which tokens matter"):
        get_task("photos").truth(sample)


def kept(truth: Truth, budget: int, *, first: bool = True, grids: Any = None) -> list[int]:
    grids = (truth.grid,) if grids is None else grids
    tokens = sum(int(np.prod(grid)) for grid in grids)
    context = vtc.VisualContext(torch.zeros(tokens, 2), budget, torch.Generator(), grids, modality="video")
    return TruthSelector(*truth[:2], first=first, seed=truth.seed).select(context).keep.tolist()


def test_the_truth_is_looked_up_in_the_models_grid() -> None:
    assert regridded([0, 5, 15], (1, 4, 4), (1, 4, 4)) == [0, 5, 15]
    assert regridded([5, 0, 15], (1, 4, 4), (1, 2, 2)) == [0, 3], "cells that share a token name it once"
    assert regridded([3], (1, 2, 2), (1, 4, 4)) == [10, 11, 14, 15]
    assert regridded([1], (1, 1, 2), (1, 3, 3)) == [1, 2, 4, 5, 7, 8], "the middle is to the right of the left half"
    assert regridded([0, 7], (2, 2, 2), (1, 2, 2)) == [0, 3]
    truth = Truth(((0, 1), (15,)), (1, 4, 4), (0,))
    assert kept(truth, 2, grids=((1, 2, 2),)) == [0, 3]
    assert kept(truth, 2, first=False, grids=((1, 2, 2),)) == [1, 2]
    with pytest.raises(vtc.InputError, match="this model makes 2 views"):
        kept(truth, 2, grids=((1, 2, 2), (1, 4, 4)))


def test_an_objects_ends_come_first() -> None:
    assert _ends_first([1, 2, 10, 11, 25, 31], 10) == (1, 31, 10, 25, 2, 11)
    assert _ends_first([], 10) == ()
    tokens = [int(t) for t in np.random.default_rng(0).permutation(90)[:30]]
    assert sorted(_ends_first(sorted(tokens), 10)) == sorted(tokens)
