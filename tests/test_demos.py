"""Every demo runs as a user would run it, and the page works in a browser."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vtc
import vtc.reference
from demos import compare_methods, video_qa, wrap_your_model

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(not vtc.reference.available(), reason="vtc-reference is not installed")


def test_compare_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "methods.png"
    methods = ["vtc-cls", "fastv", "random"]
    compare_methods.main(["--methods", *methods, "--keep-ratio", "0.25", "--size", "120", "-o", str(output)])
    told = capsys.readouterr().out
    assert all(method in told for method in methods)
    assert "64 of 256" in told
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
    told = capsys.readouterr().out
    assert "64 of 256" in told
    assert told.strip().endswith("True")


def test_video_qa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "kept.gif"
    video_qa.main(["--random-weights", "-o", str(output)])
    told = capsys.readouterr().out
    assert "re-used: features, compressed KV prefix" in told
    assert "12 frames" in told
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


def test_the_page_compares_videos(app: Any, tmp_path: Path) -> None:
    class Tiny(app.Models):
        def load(self, name: str) -> tuple[Any, Any]:  # type: ignore[override]
            return video_qa.load(None, random_weights=True)

    clip = video_qa.rolling_ball(tmp_path / "ball.mp4", count=8)
    full, answer, drawn = app.compare_video(Tiny(), "tiny", str(clip), "what happens ?", "evs", 0.25, 4.0)
    assert full.report is not None
    assert answer.report is not None
    assert full.report.visual_tokens_after == full.report.visual_tokens_before
    assert answer.report.visual_tokens_after < full.report.visual_tokens_after
    assert drawn is not None


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed (extra: demo)")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine")
def test_the_page_in_a_browser(app: Any, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    page_made = app.build(app.Models())
    _, url, _ = page_made.launch(prevent_thread_lock=True, quiet=True, share=False, server_port=None, **app._fonts())
    asked_elsewhere: list[str] = []
    try:
        with sync_playwright() as playwright:
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
            tab = browser.new_page(viewport={"width": 1360, "height": 1150})
            tab.on("request", lambda request: asked_elsewhere.append(request.url))
            tab.goto(url, wait_until="domcontentloaded")
            tab.get_by_text("one question, all visual tokens").wait_for(timeout=60_000)
            tab.set_input_files("input[type=file] >> nth=0", str(vtc.reference.samples()[6]))
            tab.wait_for_timeout(500)
            tab.locator("#ask-image").click()
            tab.wait_for_function("document.querySelector('#part textarea').value.length > 0", timeout=60_000)
            assert tab.locator("#full textarea").input_value()
            tab.locator("#bars >> text=time to first token").wait_for(timeout=30_000)
            assert tab.locator("#layers >> text=layer 0").count() == 1
            tab.locator("#overlay img").first.wait_for(timeout=30_000)
            tab.wait_for_timeout(500)
            tab.screenshot(path=str(tmp_path / "page.png"))
            browser.close()
    finally:
        page_made.close()
    outside = [
        url for url in asked_elsewhere if "127.0.0.1" not in url and "localhost" not in url and url[:5] == "http:"
    ]
    outside += [url for url in asked_elsewhere if url.startswith("https:")]
    assert outside == []
    assert (tmp_path / "page.png").stat().st_size > 20_000
