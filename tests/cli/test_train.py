"""`vtc train`: from a file of questions to modules that `vtc ask` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vtc.reference
from vtc.cli import main
from vtc.cli.arguments import shipped_modules
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


def test_trains_inside_the_decoder_with_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = vtc.reference.samples()[0]
    data, folder = tmp_path / "samples.jsonl", tmp_path / "modules"
    data.write_text(json.dumps({"image": str(picture), "question": "what is the digit ?", "answer": "yes"}) + "\n")
    command = ["train", "crosslmm", "--data", str(data), "-o", str(folder), "--steps", "1", "--batch", "1"]
    assert main(command) == 2
    assert "give keep_tokens, or keep_ratio" in capsys.readouterr().err
    assert main([*command, "--keep-tokens", "4", "--lora", "2", "--option", "inner=32", "--dtype", "float32"]) == 0
    assert f'modules="{folder}", keep_tokens=4' in capsys.readouterr().out
    assert (folder / "adapter_config.json").exists()
    method = ["--method", "crosslmm", "--option", f"modules={folder}", "--keep-tokens", "4"]
    assert main(["ask", str(picture), "what is the digit ?", *method]) == 0


@pytest.mark.parametrize(
    "line", ['{"image": "a.png", "question": "?", "answer": 3}', '{"image": "a.png", "answer": "x"}']
)
def test_a_line_of_another_form_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    data = tmp_path / "samples.jsonl"
    data.write_text(line + "\n")
    assert main(["train", "llava-mini", "--data", str(data), "-o", str(tmp_path / "made")]) == 2
    assert "line 1: expected" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_shipped_modules_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    def name(*given: object) -> str | None:
        found = shipped_modules(*given)  # type: ignore[arg-type]
        return None if found is None else Path(found).name

    assert name("llava-mini", "reference", 9) == "llava-mini-4"
    assert name("llava-mini", "reference:llava", 1) == "llava-mini-1"
    assert name("llava-mini", "reference", None) == max(
        (folder for folder in vtc.reference.modules("llava") if folder.startswith("llava-mini")),
        key=lambda folder: int(folder.rpartition("-")[2]),
    )
    assert name("llava-mini", "reference:internvl", 4) is None
    assert name("llava-mini", "reference:none", 4) is None
    assert name("llava-mini", "folder", 4) is None
    assert name("divprune", "reference", 4) is None
    assert name("atp", "reference", None) == name("atp", "reference", 64) == "atp"
    ask = [
        "ask",
        str(vtc.reference.samples()[0]),
        "what is the digit ?",
        "--method",
        "llava-mini",
        "--keep-tokens",
        "4",
    ]
    assert main(ask) == 0
    assert "4 of 256" in capsys.readouterr().out
    assert main([*ask[:4], "divprune@vision:2=0.5+vtc-asked=16"]) == 0
    assert "16 of 256" in capsys.readouterr().out
    assert main([*ask[:4], "atp"]) == 0
    assert "at decoder:5, tokens" in capsys.readouterr().out
    assert main([*ask, "--model", "reference:internvl"]) == 2
    assert 'give modules="folder"' in capsys.readouterr().err


def test_asks_about_a_region(capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["ask", str(vtc.reference.samples()[0]), "What shape is the object?", "--method", "pixelrefer"]
    assert main([*ask, "--keep-tokens", "8", "--region", "28", "28", "70", "70"]) == 0
    assert "8 of 256" in capsys.readouterr().out
    assert main([*ask, "--keep-tokens", "8"]) == 2
    assert "vtc.regions" in capsys.readouterr().err


def test_trains_on_regions(tmp_path: Path) -> None:
    line = {"image": str(vtc.reference.samples()[0]), "question": "?", "answer": "red", "region": [0, 0, 50, 50]}
    data, folder = tmp_path / "samples.jsonl", tmp_path / "modules"
    data.write_text(json.dumps(line) + "\n")
    command = ["train", "pixelrefer", "--data", str(data), "-o", str(folder), "--steps", "1", "--batch", "1"]
    assert main([*command, "--dtype", "float32"]) == 0
    assert read_modules(folder, "pixelrefer")[0].settings["source"] == "tower"
