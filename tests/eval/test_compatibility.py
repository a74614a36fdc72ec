"""The page of `python -m eval.compatibility`."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import compatibility

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_a_line_is_tried_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert compatibility.main(["--only", "nothing", "two devices"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" |")[0] for line in lines] == ["| nothing", "| DataParallel, two devices"]
    assert "works, " in lines[0]
    assert "refused: nn.DataParallel copies" in lines[1]


def test_what_goes_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: compatibility.Given) -> None:
        raise RuntimeError("no such thing | here")

    given = None
    line = compatibility.Line("x", (), missing)
    assert compatibility.tried(line, given) == "FAILS: RuntimeError: no such thing / here"  # type: ignore[arg-type]
    lacking = compatibility.Line("x", ("no-such-package",), missing)
    assert "no-such-package not installed" in compatibility.tried(lacking, given)  # type: ignore[arg-type]


def test_the_page_has_every_line_and_none_that_goes_wrong() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ")[0][2:] for line in page.splitlines() if line.startswith("| ")][2:]
    assert rows == [line.name for line in compatibility.LINES]
    assert not [word for word in ("FAILS", "DIFFERS") if word in page]
