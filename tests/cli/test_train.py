"""`vtc train`: from a file of questions to modules that `vtc ask` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vtc.reference
from vtc.cli import main
from vtc.selectors.learned import read_modules

pytestmark = pytest.mark.skipif(not vtc.reference.available(), reason="needs vtc-reference")


def test_trains_and_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = vtc.reference.samples()[0]
    lines = [{"image": str(picture), "question": "what is the digit ?", "answer": "yes"}]
    lines.append({"image": str(picture), "question": "what is the digit ?"})
    data, folder = tmp_path / "samples.jsonl", tmp_path / "modules"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["train", "llava-mini", "--data", str(data), "-o", str(folder), "--steps", "1", "--batch", "2"]
    assert main([*command, "--option", "side=1", "--dtype", "float32"]) == 0
    assert f'modules="{folder}"' in capsys.readouterr().out
    made_for = read_modules(folder, "llava-mini")[0]
    assert made_for.settings["side"] == 1
    assert made_for.training["labelled"] == 1
    method = ["--method", "llava-mini", "--option", f"modules={folder}", "--keep-tokens", "1"]
    assert main(["ask", str(picture), "what is the digit ?", *method]) == 0
    assert main(command) == 2
    assert "holds trained modules already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ['{"image": "a.png", "question": "?", "answer": 3}', '{"image": "a.png", "answer": "x"}']
)
def test_a_line_of_another_form_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    data = tmp_path / "samples.jsonl"
    data.write_text(line + "\n")
    assert main(["train", "llava-mini", "--data", str(data), "-o", str(tmp_path / "made")]) == 2
    assert "line 1: expected" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
