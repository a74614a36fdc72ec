"""What the plug-in for vLLM decides before vLLM is needed: settings, which methods can run, counts, and `vtc serve`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from tests import tiny
from vtc import registry
from vtc.cli import main
from vtc.core.observations import TokenGrids, VisionAttention, VisionHidden
from vtc.core.signals import ClsAttention, MeanKeys, PreProjector
from vtc.integrations.vllm import choosing, families, settings, tower

ROOT = Path(__file__).parent.parent.parent


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        ({"VTC_METHOD": "", "VTC_KEEP_RATIO": " "}, {}),
        ({"VTC_KERNELS": "torch", "HOME": "/"}, {}),
        ({"VTC_METHOD": "divprune", "VTC_KEEP_RATIO": "0.25"}, {"method": "divprune", "keep_ratio": 0.25}),
        ({"VTC_KEEP_TOKENS": "64", "VTC_SEED": "7"}, {"keep_tokens": 64, "seed": 7}),
        ({"VTC_METHOD": "vtc", "VTC_OPTIONS": '{"width": 0.3}'}, {"method": "vtc", "width": 0.3}),
    ],
)
def test_variables_are_settings(environ: dict[str, str], expected: dict[str, Any]) -> None:
    assert settings.from_environment(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"VTC_KEEP_RATIO": "a quarter"}, "VTC_KEEP_RATIO must be a number, got 'a quarter'"),
        ({"VTC_KEEP_TOKENS": "true"}, "VTC_KEEP_TOKENS must be a number"),
        ({"VTC_OPTIONS": "width=3"}, "VTC_OPTIONS must be a JSON object"),
        ({"VTC_OPTIONS": "[1]"}, "VTC_OPTIONS must be a JSON object"),
    ],
)
def test_variables_that_mean_nothing_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(vtc.ConfigError, match=message):
        settings.from_environment(environ)


@pytest.mark.parametrize(
    "config",
    [
        vtc.CompressionConfig("divprune", keep_ratio=0.25),
        vtc.CompressionConfig(
            "vtc", keep_tokens=16, seed=3, structural="drop", options={"width": 0.3, "quality": None}
        ),
    ],
)
def test_a_configuration_survives_the_environment(config: vtc.CompressionConfig) -> None:
    assert settings.resolve(settings.from_environment(settings.environment_of(config))) == config
    assert settings.parse(settings.written(config)).config == config


def test_later_layers_win() -> None:
    server = {"method": "vtc", "width": 0.3, "keep_ratio": 0.25, "seed": 5}
    assert settings.resolve({}, {}, {}) is None
    assert settings.resolve(server, {"keep_tokens": 9}) == vtc.CompressionConfig(
        "vtc", keep_tokens=9, seed=5, options={"width": 0.3}
    )
    # Another method does not inherit the options of the first, and the same one may be given others.
    assert settings.resolve(server, {"method": "divprune"}) == vtc.CompressionConfig(
        "divprune", keep_ratio=0.25, seed=5
    )
    assert settings.resolve({"keep_ratio": 0.5}) == vtc.CompressionConfig("vtc", keep_ratio=0.5)


def test_equal_settings_are_written_alike() -> None:
    one = settings.resolve({"method": "vtc", "width": 0.3, "exponent": 0.5}, {"keep_ratio": 0.25})
    two = settings.resolve({"keep_tokens": 3}, {"method": "vtc", "keep_ratio": 0.25}, {"exponent": 0.5, "width": 0.3})
    assert one is not None
    assert two is not None
    assert settings.written(one) == settings.written(two)
    others = [{"keep_ratio": 0.26}, {"seed": 1}, {"method": "divprune"}, {"width": 0.31}, {"structural": "drop"}]
    layered = [
        settings.resolve({"method": "vtc", "width": 0.3, "exponent": 0.5, "keep_ratio": 0.25}, x) for x in others
    ]
    assert len({settings.written(config) for config in (one, *layered) if config}) == 1 + len(others)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ({"method": "divprun", "keep_ratio": 0.25}, vtc.UnsupportedMethodError, "Did you mean 'divprune'"),
        ({"method": "divprune"}, vtc.ConfigError, "exactly one of keep_ratio and keep_tokens"),
        ({"keep_ratio": 25}, vtc.ConfigError, r"must lie in \(0, 1\], got 25"),
        ({"method": "divprune", "keep_ratio": 0.5, "widht": 1}, vtc.ConfigError, "no option 'widht'"),
        ({"keep_ratio": 0.5, "positions": "compact"}, vtc.ConfigError, "vtc_positions cannot be chosen"),
        (
            {"method": "divprune", "keep_ratio": 0.5, "at": "decoder:2"},
            vtc.UnsupportedMethodError,
            "before the language",
        ),
        ({"method": "fastv", "keep_ratio": 0.5}, vtc.UnsupportedMethodError, "it works at 'decoder:2'"),
        ({"method": "cdpruner", "keep_ratio": 0.5}, vtc.UnsupportedMethodError, "it reads text_embeds"),
        ({"method": "prumerge", "keep_ratio": 0.5}, vtc.UnsupportedMethodError, "it decides itself how many"),
        ({"method": "h2o", "keep_ratio": 0.5}, vtc.UnsupportedMethodError, "key-value caches"),
        (
            {"method": "pixelprune", "keep_ratio": 0.5},
            vtc.UnsupportedMethodError,
            "vLLM's towers take whole pictures",
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name(layer: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        settings.resolve(layer)
    if "inside vLLM" in str(caught.value):
        assert "divprune" in str(caught.value)  # what would work


def test_the_methods_are_those_that_read_the_tower_at_most() -> None:
    found = settings.methods()
    assert {"divprune", "vtc", "evs", "vidcom2", "random", "uniform", "pool", "visionzip", "vtc-cls"} <= set(found)
    for name in found:
        (stage,) = registry.get_selector(name).stages(None, 0.25)
        assert str(stage.site) == "decoder"
        assert all(signal.reads in (TokenGrids, VisionAttention, VisionHidden) for signal in stage.requires)
    assert not {"fastv", "tome", "snapkv", "prumerge", "cdpruner", "rediprune", "atp", "aim"} & set(found)


def test_a_model_settles_what_a_method_reads() -> None:
    llava, qwen = (tower.adapter_of(tiny.ARCHITECTURES[name].config()) for name in ("llava", "qwen2_5_vl"))
    assert {"visionzip", "vtc"} <= set(settings.methods(llava))
    assert {"divprune", "vtc", "hiprune"} <= set(settings.methods(qwen))
    assert "visionzip" not in settings.methods(qwen)
    default = vtc.CompressionConfig("vtc", keep_ratio=0.5)
    assert tower.reads_tower(settings.planned(default, llava))
    assert not tower.reads_tower(settings.planned(default, qwen))


@pytest.mark.parametrize(
    ("family", "layer", "message"),
    [
        (
            "qwen2_5_vl",
            {"method": "visionzip"},
            "no .CLS. token; try score_source=.received.*Inside vLLM, use.*evs",
        ),
        ("llava", {"method": "vscan"}, "it works at 'decoder:2'"),
        ("llava", {"method": "aim"}, "it works at 'decoder:3'"),
        ("llava", {"method": "todre"}, "it works at 'decoder:3'"),
        ("llava", {"method": "needs_last_layer"}, "tower layer 3, and vLLM builds the tower up to layer 2"),
    ],
)
def test_what_a_model_lacks_is_named(
    family: str, layer: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layer["method"] == "needs_last_layer":
        monkeypatch.setattr(registry.get_selector("visionzip").__class__, "beside", (MeanKeys((-1,)),))
        layer = {"method": "visionzip"}
    adapter = tower.adapter_of(tiny.ARCHITECTURES[family].config())
    with pytest.raises(vtc.UnsupportedMethodError, match=message):
        settings.resolve({**layer, "keep_ratio": 0.5}, adapter=lambda: adapter)


# -------------------------------------------------------------------------------------------------- counts and choices


@pytest.mark.parametrize("method", settings.methods())
@pytest.mark.parametrize("modality", ["image", "video"])
def test_the_count_is_known_before_the_features(method: str, modality: str) -> None:
    grids = ((1, 4, 5), (1, 6, 6)) if modality == "image" else ((4, 3, 5),)
    n = sum(t * h * w for t, h, w in grids)
    rows = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    for given in ({"keep_ratio": 0.25}, {"keep_tokens": 7}, {"keep_tokens": 10_000}, {"keep_ratio": 1.0}):
        config = settings.resolve({"method": method}, given)
        assert config is not None
        stage = settings.planned(config)
        signals = {
            signal: torch.rand(n, max(1, len(signal.vision_layers(24, 22))), 4)
            for signal in tower.tower_signals(stage, modality)
        }
        kept, out = choosing.choose_rows(stage, choosing.Visual(modality, grids), rows, None, signals)
        assert len(kept) == len(out) == choosing.kept_count(stage, n)


def test_the_choice_is_that_of_the_library() -> None:
    rows = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    for method in ("divprune", "vtc", "uniform"):
        stage = settings.planned(vtc.CompressionConfig(method, keep_ratio=0.25))
        kept, out = choosing.choose_rows(stage, choosing.Visual("image", ((1, 4, 6),)), rows)
        selection = vtc.select(method, features=rows, grid_thw=(1, 4, 6), keep_ratio=0.25)
        assert torch.equal(kept, selection.keep)
        assert torch.equal(out, selection.merge(rows))


@pytest.mark.parametrize(("structural", "expected"), [("keep", 5 + 4), ("drop", 5)])
def test_newlines_stay_beside_what_is_chosen(structural: str, expected: int) -> None:
    newline = torch.tensor([False] * 5 + [True]).repeat(4)
    rows = torch.randn(24, 8, generator=torch.Generator().manual_seed(2))
    stage = settings.planned(vtc.CompressionConfig("divprune", keep_tokens=5, structural=structural))
    visual = choosing.Visual("image", ((1, 4, 5),), newline)
    kept, out = choosing.choose_rows(stage, visual, rows)
    assert len(kept) == choosing.kept_count(stage, 24, 4) == expected
    assert int(newline[kept].sum()) == expected - 5
    assert torch.equal(out, rows[kept])


def test_planes_behind_the_features_are_neither_read_nor_merged() -> None:
    rows = torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
    planes = torch.full((24, 4), torch.nan)
    planes[:, 0] = torch.arange(24)
    stage = settings.planned(vtc.CompressionConfig("vtc", keep_tokens=6))
    visual = choosing.Visual("image", ((1, 4, 6),))
    kept, out = choosing.choose_rows(stage, visual, torch.cat([rows, planes], dim=1), 8)
    alone, merged = choosing.choose_rows(stage, visual, rows)
    assert torch.equal(kept, alone)
    assert torch.equal(out[:, :8], merged)
    assert not torch.equal(merged, rows[kept])  # it merges
    assert out[:, 8].tolist() == kept.tolist()


def test_grids_that_do_not_fit_are_named() -> None:
    stage = settings.planned(vtc.CompressionConfig("divprune", keep_tokens=6))
    with pytest.raises(vtc.InputError, match="do not hold the 24 tokens"):
        choosing.choose_rows(stage, choosing.Visual("image", ((1, 5, 5),)), torch.randn(24, 8))


# ----------------------------------------------------------------------------------------------------------- the tower


class Attends(nn.Module):
    """What stands for vLLM's attention in a tower: it is handed queries, keys and values."""

    head_size, scale = 4, 0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attends()

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.forward(hidden)  # past all hooks, as classes of vLLM that may be compiled do

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.add_(self.attn(hidden * 2, hidden * 3, hidden))  # in place, as some of vLLM's do


class Towered(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_signals_are_computed_while_a_tower_runs() -> None:
    model = Towered(3)
    adapter = tower.adapter_of(tiny.ARCHITECTURES["llava"].config())  # [CLS], and layer 2 of 4 makes the features
    read = tower.Tower(adapter, model, Attends, packed=False)
    signals = (ClsAttention((0, 2)), PreProjector())
    pixels = torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(0))
    with read.observed(signals, "image") as seen:
        model(pixels.clone())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)

    def flat(patches: Tensor) -> Tensor:
        return patches.flatten(0, 1)

    cls = read.values(seen, (0, 1), signals[0], "image", flat)
    assert cls.shape == (2 * 16, 2, 2)
    for number, layer in enumerate((0, 2)):
        heads = (pixels * 2**layer).unflatten(-1, (2, 4)).transpose(1, 2)
        expected = ((heads[:, :, :1] * 2) @ (heads * 3).mT * 0.5).softmax(dim=-1)[:, :, 0, 1:]
        torch.testing.assert_close(cls[:, number].unflatten(0, (2, 16)), expected.transpose(1, 2))
    hidden = read.values(seen, (0, 1), signals[1], "image", flat)
    torch.testing.assert_close(hidden[:, 0].unflatten(0, (2, 16)), pixels[:, 1:] * 8)
    with pytest.raises(vtc.errors.StateError, match=r"cls_attention was seen \[1\] times in vLLM's tower instead of 2"):
        read.values(seen, (0, 2), signals[0], "image", flat)
    with pytest.raises(vtc.UnsupportedModelError, match="no attention in the vision tower of Linear"):
        tower.Tower(adapter, nn.Linear(2, 2), Attends, packed=False)


# ----------------------------------------------------------------------------------------------------------- vtc serve


def test_serve_prints_what_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["serve", "some/hub-model", "--method", "divprune", "--keep-ratio", "0.25", "--print"]
    assert main([*given, "--vllm=--port 8001 --max-model-len 512"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("VTC_METHOD=divprune VTC_KEEP_RATIO=0.25 ")
    assert printed.endswith(
        "-m vllm.entrypoints.openai.api_server --model some/hub-model --port 8001 --max-model-len 512\n"
    )
    assert main(["serve", "m", "--keep-tokens", "64", "--option", "width=0.3", "--seed", "4", "--print"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("VTC_METHOD=vtc VTC_KEEP_TOKENS=64 VTC_SEED=4 VTC_OPTIONS='{\"width\": 0.3}' ")
    assert main(["serve", "m", "--method", "vtc(width=0.3)=64", "--seed", "4", "--print"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--method", "fastv"], "fastv cannot run inside vLLM"),
        (["m", "--method", "divprun"], "Did you mean 'divprune'"),
        (["m", "--keep-ratio", "0"], "must lie in (0, 1]"),
        (["m", "--method", "vtc=0.5 compact"], "positions cannot be chosen in vLLM"),
        (["m", "--method", "vtc@pixels=0.5"], "tokens leave before the language model"),
        (["m", "--method", "resize=0.5+vtc=0.5"], "takes one stage"),
        (["m", "--vllm", "--port '8"], "--vllm"),
        (["PALIGEMMA"], "vtc does not compress PaliGemmaForConditionalGeneration inside vLLM"),
        (["EMPTY"], "no config.json"),
    ],
)
def test_serve_refuses_before_it_starts(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "PALIGEMMA").mkdir()
    config = {"architectures": ["PaliGemmaForConditionalGeneration"]}
    (tmp_path / "PALIGEMMA" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if arguments[0].isupper():
        arguments = [str(tmp_path / arguments[0]), *arguments[1:]]
    assert main(["serve", *arguments, "--print"]) == 2
    assert message in capsys.readouterr().err


def test_families_have_adapters_of_the_same_name() -> None:
    import transformers

    known = {getattr(transformers, architecture).config_class.model_type for architecture in families.FAMILIES}
    assert known <= set(vtc.supported_models())


def test_neither_importing_nor_settings_need_vllm() -> None:
    code = """
import sys
sys.modules["vllm"] = None
import vtc
from vtc.integrations.vllm import choosing, families, settings
assert settings.resolve({"keep_ratio": 0.25}).method == "vtc"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = 'import sys, vtc, vtc.cli; assert not any(name.startswith("vllm") for name in sys.modules)'
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "--requests must lie between 1 and 4096"),
        (["--concurrency", "1", "1000"], "--concurrency must lie between 1 and 256"),
        (["--keep-ratio", "2"], "must lie in (0, 1]"),
        (["--method", "divprun"], "Did you mean 'divprune'"),
    ],
)
def test_a_load_that_measures_nothing_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "some-model", *arguments]) == 2
    assert message in capsys.readouterr().err
