"""Every demo runs as a user would run it, and the page works in a browser."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vtc
import vtc.reference
from demos import compare_methods, video_qa, wrap_your_model
from tests import odd_pictures

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(not vtc.reference.available(), reason="vtc-reference is not installed")


def test_compare_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "methods.png"
    methods = ["vtc-cls", "fastv", "random"]
    compare_methods.main(["--methods", *methods, "--keep-ratio", "0.25", "--size", "120", "-o", str(output)])
    printed = capsys.readouterr().out
    assert all(method in printed for method in methods)
    assert "64 of 256" in printed
    with Image.open(output) as drawn:
        assert drawn.size == (4 * 120 + 3 * 6, 120 + 2 * 18)


def test_the_picture_of_the_readme_is_small_and_shown() -> None:
    root = Path(__file__).parent.parent
    picture = root / "docs" / "assets" / "kept.png"
    assert picture.stat().st_size < 300_000
    first_screen = (root / "README.md").read_text(encoding="utf-8")[:900]
    assert "docs/assets/kept.png" in first_screen


def test_wrap_your_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Three of the methods are enough to see it work.
    listed = vtc.list_methods
    monkeypatch.setattr(
        "vtc.list_methods",
        lambda model: {k: v for k, v in listed(model).items() if k in ("vtc-cls", "fastv", "random")},
    )
    wrap_your_model.main([])
    printed = capsys.readouterr().out
    assert "64 of 256" in printed
    assert printed.strip().endswith("True")


def test_video_qa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "kept.gif"
    video_qa.main(["--random-weights", "-o", str(output)])
    printed = capsys.readouterr().out
    assert "re-used: features, compressed KV prefix" in printed
    assert "12 frames" in printed
    with Image.open(output) as drawn:
        assert drawn.n_frames > 1


# ----------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def app() -> Any:
    from demos import app

    return app


def test_the_page_compares(app: Any) -> None:
    image = Image.open(vtc.reference.samples()[6])
    made = app.compare(app.Models(), "llava", image, "What is left of the cup?", "fastv", 0.25)
    assert made.full.text
    assert made.report.visual_tokens_after == 64
    assert 0 < made.full.first_token < made.full.total
    assert "KV cache" in app.summary(made.report, 0.2, 0.1)
    assert app.layers(made.report).count("layer ") == len(made.report.lengths_per_layer)
    with pytest.raises(vtc.InputError, match="a picture and a question"):
        app.compare(app.Models(), "llava", None, "?", "fastv", 0.25)


def test_the_page_turns_photographs(app: Any, tmp_path: Path) -> None:
    path = odd_pictures.write(tmp_path / "photo.png")
    made = app.compare(app.Models(), "qwen2_5_vl", str(path), "What is it?", "uniform", 1.0)
    width, height = made.overlay.size
    assert (width, height - 20) == tuple(12 * edge for edge in odd_pictures.SIZE)
    assert made.overlay.getpixel((width // 2, height - 60)) == (128, 128, 128)


class WithVideos:
    """The reference models, and one with random weights that takes videos."""

    @staticmethod
    def of(app: Any) -> Any:
        class Models(app.Models):
            def load(self, name: str) -> tuple[Any, Any]:  # type: ignore[override]
                return video_qa.load(None, random_weights=True) if name == "tiny" else super().load(name)

        models = Models()
        models.names.append("tiny")
        return models


def test_the_page_knows_which_models_take_videos(app: Any, tmp_path: Path) -> None:
    # internvl's processor takes videos, its template does not
    assert app.Models().for_videos() == ["qwen2_5_vl", "qwen2_5_vl-long"]
    assert WithVideos.of(app).for_videos()[-1] == "tiny"
    # A checkpoint's weights are not read for it.
    _, processor = video_qa.load(None, random_weights=True)
    processor.save_pretrained(tmp_path)
    assert app.Models({"mine": tmp_path}).for_videos()[-1] == "mine"


def test_the_page_compares_videos(app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = video_qa.rolling_ball(tmp_path / "ball.mp4", count=8)
    asked = ("tiny", str(clip), "what happens ?", "evs", 0.25, 4.0)
    full, answer, drawn = app.compare_video(WithVideos.of(app), *asked)
    assert full.report is not None
    assert answer.report is not None
    assert full.report.visual_tokens_after == full.report.visual_tokens_before
    assert answer.report.visual_tokens_after < full.report.visual_tokens_after
    assert drawn is not None
    monkeypatch.setattr(app, "SHEET", 3)
    assert app.compare_video(WithVideos.of(app), *asked)[2] is None
    with pytest.raises(vtc.InputError, match="a video and a question"):
        app.compare_video(WithVideos.of(app), "tiny", None, "?", "evs", 0.25, 4.0)


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed (extra: demo)")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine")
def test_the_page_in_a_browser(app: Any, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    clip = video_qa.rolling_ball(tmp_path / "ball.mp4", count=8)
    models = WithVideos.of(app)
    models.for_videos = lambda: ["tiny"]
    made = app.build(models)
    _, url, _ = made.launch(prevent_thread_lock=True, quiet=True, share=False, server_port=None, **app._fonts())
    asked_for: list[str] = []
    try:
        with sync_playwright() as playwright:
            context = playwright.chromium.launch_persistent_context(
                tmp_path / "profile", executable_path=BROWSER, args=FLAGS, viewport={"width": 1360, "height": 1150}
            )
            tab = context.new_page()
            tab.set_default_timeout(120_000)
            tab.on("request", lambda request: asked_for.append(request.url))
            tab.goto(url, wait_until="domcontentloaded")
            tab.get_by_text("one question, all visual tokens").wait_for()

            # The figures beside the bars; what gradio writes over them while it works is left out.
            figures = "[...document.querySelectorAll('#bars .figure')].map(figure => figure.innerText).join()"

            def answered() -> str:
                tab.wait_for_function(f"{figures} != ''")
                assert "time to first token" in tab.locator("#bars").inner_text()
                assert tab.locator("#full textarea").input_value()
                assert tab.locator("#part textarea").input_value()
                assert tab.locator("#layers >> text=layer 0").count() == 1
                tab.locator("#overlay img").first.wait_for()
                tab.wait_for_timeout(1000)  # what was written over it fades
                return str(tab.evaluate(figures))

            tab.get_by_text("What does the sign say?").first.click()
            tab.wait_for_function("document.querySelectorAll('[data-testid=image] img').length > 0")
            tab.locator("#ask-image").click()
            assert answered().startswith("256")
            tab.screenshot(path=str(tmp_path / "image.png"), full_page=True)

            tab.get_by_role("tab", name="video").click()
            tab.locator("#ask-video").click()  # a mistake is shown on the page
            tab.get_by_text("Give a video and a question.").first.wait_for()
            assert not tab.locator("#full textarea").input_value()  # the answers were to another question
            assert not tab.locator("#overlay img").count()
            tab.locator("input[type=file][accept*='video']").first.set_input_files(str(clip))
            tab.locator("video").first.wait_for()
            tab.locator("#ask-video").click()
            answered()
            assert "tiny, evs, keep ratio 0.25" in tab.locator("#said").inner_text()
            tab.screenshot(path=str(tmp_path / "video.png"), full_page=True)
            context.close()
    finally:
        made.close()
    outside = [url for url in asked_for if not url.startswith(("data:", "blob:", "http://127.0.0.1:"))]
    assert outside == []


@pytest.mark.parametrize("question", ["<image>", "", None])
def test_the_page_tells_what_is_wrong_with_a_question(question: str | None) -> None:
    app = pytest.importorskip("demos.app")
    picture = Image.new("RGB", (64, 48))
    with pytest.raises(vtc.InputError, match="question"):
        app.compare(app.Models(), "llava", picture, question, "random", 0.5)


def test_mistakes_in_a_demo_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parent.parent
    (tmp_path / "notes.png").write_text("no picture")
    gone = [str(root / "demos" / "compare_methods.py"), str(tmp_path / "gone.png")]
    env = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, *gone], capture_output=True, text=True, env=env)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    for command, message in (
        (gone, "no such file"),
        (["compare_methods.py", str(tmp_path / "notes.png")], "not a picture"),
        (["compare_methods.py", "-o", str(tmp_path)], "this is a folder"),
        (["video_qa.py", "-o", str(tmp_path / "gone" / "kept.gif")], "does not exist"),
        (["app.py", "--model", "nonsense"], "NAME=FOLDER"),
    ):
        path = str(root / "demos" / command[0])
        monkeypatch.setattr(sys, "argv", [path, *command[1:]])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(path, run_name="__main__")
        assert left.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
