"""The plug-in for lmms-eval: what its arguments mean always, and that lmms-eval runs it where it is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import vtc
import vtc.reference
from eval.lmms.__main__ import main as write_task
from tests import tiny
from tests.tiny_processors import processor
from vtc.integrations import lmms_eval as plugin

ROOT = Path(__file__).parent.parent.parent
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed (see docs/evaluate.md)")


# ---------------------------------------------------------------------------------------------------------- arguments


def test_arguments_are_parted() -> None:
    given = {"pretrained": "x", "batch_size": 1, "vtc_method": "fastv", "vtc_keep_tokens": 64, "vtc_layer": 3}
    config, others = plugin.compression(given)
    assert config == vtc.CompressionConfig("fastv", keep_tokens=64, options={"layer": 3})
    assert others == {"pretrained": "x", "batch_size": 1}
    config, _ = plugin.compression(
        {"vtc_method": "random", "vtc_keep_ratio": 1, "vtc_positions": "compact", "vtc_seed": 7}
    )
    assert config == vtc.CompressionConfig("random", keep_ratio=1, positions="compact", seed=7)
    config, _ = plugin.compression({"vtc_method": "atp", "vtc_keep_ratio": 0.5, "vtc_layers": "[1, 2]"})
    assert config is not None
    assert config.options == {"layers": (1, 2)}


def test_without_arguments_of_ours_all_tokens_stay() -> None:
    assert plugin.compression({"pretrained": "x"}) == (None, {"pretrained": "x"})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vtc_keep_ratio": 0.25}, vtc.ConfigError, "vtc_keep_ratio given without vtc_method"),
        ({"vtc_methd": "fastv"}, vtc.ConfigError, "vtc_methd given without vtc_method"),
        ({"vtc_method": "fastw", "vtc_keep_ratio": 0.25}, vtc.UnsupportedMethodError, "Did you mean 'fastv'"),
        ({"vtc_method": "fastv", "vtc_keep_ratio": 0.25, "vtc_lier": 3}, vtc.ConfigError, "lier"),
        ({"vtc_method": "fastv", "vtc_keep_ratio": 25}, vtc.ConfigError, r"\(0, 1\]"),
        ({"vtc_method": "fastv"}, vtc.ConfigError, "exactly one"),
        ({"vtc_method": "fastv", "vtc_keep_ratio": 0.1, "vtc_positions": "new"}, vtc.ConfigError, "positions"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plugin.compression(arguments)


def test_importing_needs_no_lmms_eval() -> None:
    code = """
import sys
sys.modules["lmms_eval"] = None
import vtc
import vtc.reference
assert "vtc.integrations" not in sys.modules
import vtc.integrations.lmms_eval as plugin
assert plugin.compression({}) == (None, {})
for name in ("VtcLlavaHf", "VtcLlavaHfChat", "VtcQwen2_5_VL", "VtcQwen2_5_VLChat", "VtcInternVLHfChat"):
    try:
        getattr(plugin, name)
    except ImportError:
        continue
    raise SystemExit(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_models_are_those_of_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ModuleType("registry_v2")
    registry.ModelManifest = lambda **given: tuple(given.values())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", registry)
    here = plugin.__name__
    assert set(plugin.manifests()) == {
        ("vtc_llava_hf", f"{here}.VtcLlavaHf", f"{here}.VtcLlavaHfChat"),
        ("vtc_llava_onevision", f"{here}.VtcLlavaHf", f"{here}.VtcLlavaHfChat"),
        ("vtc_qwen2_5_vl", f"{here}.VtcQwen2_5_VL", f"{here}.VtcQwen2_5_VLChat"),
        ("vtc_internvl_hf", None, f"{here}.VtcInternVLHfChat"),
    }


def test_the_entry_point_names_what_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."lmms_eval.models"]\nvtc = "vtc.integrations.lmms_eval:manifests"\n' in project
    assert callable(plugin.manifests)
    with pytest.raises(AttributeError, match="VtcNothing"):
        plugin.VtcNothing  # noqa: B018


# -------------------------------------------------------------------------------------------- over a class of theirs


class Base:
    """Like several classes of lmms-eval, goes on with an empty answer where generate() fails."""

    def __init__(self, family: str = "llava", **kwargs: Any) -> None:
        assert kwargs == {}
        self.model = tiny.build(family).model
        self.family = family

    def generate_until(self, requests: list[Any]) -> list[Any]:
        answers = []
        for inputs in requests:
            try:
                answers.append(self.model.generate(**inputs, max_new_tokens=2, do_sample=False))
            except Exception:
                answers.append(None)
        return answers


class Subject(plugin._Compressed, Base):
    pass


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged, without lmms-eval and its logger."""
    lines: list[str] = []

    class Logger:
        info = warning = staticmethod(lines.append)

    metrics, loguru = ModuleType("gen_metrics"), ModuleType("loguru")
    metrics.log_metrics = lambda **given: lines.append(json.dumps(given))  # type: ignore[attr-defined]
    loguru.logger = Logger  # type: ignore[attr-defined]
    for name in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.model_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lmms_eval.models.model_utils.gen_metrics", metrics)
    monkeypatch.setitem(sys.modules, "loguru", loguru)
    return lines


def requests() -> list[dict[str, Any]]:
    inputs = tiny.build("llava").batch("single")
    text = torch.tensor([[tiny.BOS, 5, 6, 7]])
    return [inputs, {"input_ids": text, "attention_mask": torch.ones_like(text)}, inputs]


def test_what_is_kept_is_logged(logged: list[str]) -> None:
    subject = Subject(vtc_method="divprune", vtc_keep_ratio=0.25)
    answers = subject.generate_until(requests())
    with vtc.compressed(tiny.build("llava").model, "divprune", keep_ratio=0.25) as model:
        assert torch.equal(answers[0], model.generate(**requests()[0], max_new_tokens=2, do_sample=False))
    line, figures = logged
    assert "method=divprune, keep_ratio=0.25" in line
    assert "kept 4.0 of 16.0 visual tokens per prompt (25.0 %" in line
    assert "in 2 prompts" in line  # the one of text alone has nothing to keep
    assert json.loads(figures)["additional_metrics"]["vtc_kept_share"] == 0.25


def test_all_tokens_are_logged_as_well(logged: list[str]) -> None:
    Subject().generate_until(requests())
    assert logged == ["vtc: no vtc_method among the model arguments, so all visual tokens were kept"]


def test_our_errors_are_not_swallowed(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(vtc_method="divprune", vtc_keep_ratio=0.25)
    tried = []

    def broken(*_: Any, **__: Any) -> Any:
        tried.append(1)
        raise vtc.InputError("features are not finite")

    monkeypatch.setattr("vtc.engine.before_decoder.choose", broken)
    with pytest.raises(vtc.InputError, match="not finite"):
        subject.generate_until(requests())
    assert len(tried) == 1  # and nothing is tried after it


def test_other_errors_are_counted(logged: list[str]) -> None:
    subject = Subject(vtc_method="divprune", vtc_keep_ratio=0.25)
    answers = subject.generate_until([*requests(), {"input_ids": None, "inputs_embeds": 3}])
    assert answers[-1] is None
    assert logged[-1].startswith("vtc: 1 batches could not be answered and may count as wrong; the first: ")


def test_a_model_that_cannot_is_refused() -> None:
    with pytest.raises(vtc.UnsupportedMethodError, match="vtc-cls needs"):
        Subject(family="gemma3", vtc_method="vtc-cls", vtc_keep_ratio=0.25)


# ------------------------------------------------------------------------------------------------- lmms-eval itself


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.lmms", "--n", "1", "--out", str(folder)])
        write_task()
    return folder


def test_the_task_is_that_of_the_harness(task: Path) -> None:
    from eval.tasks import get_task

    samples = get_task("scenes").samples(None)
    with open(task / "questions.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert [row["question"] for row in rows] == [sample.question for sample in samples[: len(rows)]]
    assert [row["answer"] for row in rows] == [sample.target for sample in samples[: len(rows)]]
    for row, sample in zip(rows, samples, strict=False):
        (ours,) = sample.open_images()
        with Image.open(task / row["image"]) as theirs:
            assert theirs.convert("RGB").tobytes() == ours.tobytes()
    assert json.dumps(str(task / "questions.jsonl")) in (task / "vtc_scenes.yaml").read_text(encoding="utf-8")


FAMILIES = {
    "vtc_llava_onevision": ("llava_onevision_video", {"dtype": "float32"}),
    "vtc_qwen2_5_vl": ("qwen2_5_vl_video", {"min_pixels": 64, "max_pixels": 1024}),
    "vtc_internvl_hf": ("internvl", {}),
}


@needs_lmms_eval
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs(name: str, task: Path, tmp_path: Path) -> None:
    family, arguments = FAMILIES[name]
    folder = tmp_path / "model"
    tiny.build(family).model.save_pretrained(folder)
    processor(family).save_pretrained(folder)
    made = evaluate(name, task, pretrained=str(folder), vtc_method="uniform", vtc_keep_ratio=0.5, **arguments)
    assert made["throughput"]["avg_vtc_prompts"] == 4
    assert made["throughput"]["avg_vtc_kept_share"] == pytest.approx(0.5, abs=0.1)


@needs_lmms_eval
@pytest.mark.skipif(not vtc.reference.available(), reason="vtc-reference is not installed")
@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_answers_are_those_of_the_harness(simple: bool, task: Path, tmp_path: Path) -> None:
    import vtc_reference
    from eval import models
    from eval.tasks import get_task

    vtc_reference.export("llava", tmp_path / "llava")
    arguments = {"pretrained": str(tmp_path / "llava"), "dtype": "float32"}
    made = evaluate("vtc_llava_hf", task, simple, vtc_method="divprune", vtc_keep_ratio=0.11, **arguments)
    theirs = [sample["filtered_resps"][0] for sample in made["samples"]["vtc_scenes"]]
    loaded = models.load("reference")
    samples = get_task("scenes").samples(None)[:4]
    with vtc.compressed(loaded.model, "divprune", keep_ratio=0.11):
        ours = [models.answer(loaded, models.inputs(loaded, [sample], [sample.open()]), 6)[0][0] for sample in samples]
    if simple:  # puts a line break between picture and question, which is another prompt
        assert len(theirs) == len(ours)
    else:
        assert [text.strip() for text in theirs] == ours
    assert made["throughput"]["avg_vtc_visual_tokens_kept"] == 28


def evaluate(name: str, task: Path, simple: bool = False, **arguments: Any) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    made: dict[str, Any] = simple_evaluate(
        model=name,
        model_args=",".join(f"{key}={value}" for key, value in {"device_map": "cpu", **arguments}.items()),
        tasks=["vtc_scenes"],
        task_manager=TaskManager("ERROR", include_path=str(task), model_name=name),
        batch_size=1,
        device="cpu",
        limit=4,
        log_samples=True,
        force_simple=simple,
        bootstrap_iters=0,
    )
    return made
