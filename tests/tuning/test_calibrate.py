"""Calibration: never worse than the defaults, never over the budget, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("optuna")

import vtc
from tests import odd_pictures, tiny
from vtc.cli import main
from vtc.core.ranges import Choice, Each, Float, Int
from vtc.registry import selectors
from vtc.tuning.calibrate import _Trial
from vtc.tuning.samples import prompts


@pytest.fixture(scope="module")
def case() -> tiny.TinyCase:
    return tiny.build("llava")


@pytest.fixture(scope="module")
def rows(case: tiny.TinyCase) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    single = case.batch("single")
    return [{**single, "pixel_values": torch.randn_like(single["pixel_values"])} for _ in range(3)]


def trial(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> _Trial:
    return _Trial(case.model, rows)


def quiet(case: tiny.TinyCase, rows: list[dict[str, Any]], **more: Any) -> vtc.CompressionConfig:
    return vtc.calibrate(case.model, None, rows, progress=False, **more)


def test_what_is_found_is_at_least_as_good_as_the_defaults(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    more = {"keep_ratio": 0.5, "method": "vflowopt", "trials": 20}
    config = quiet(case, rows, **more)
    measure = trial(case, rows)
    found, kept = measure(config)
    default, kept_by_default = measure(vtc.CompressionConfig("vflowopt", keep_ratio=0.5))
    assert found > default
    assert kept <= kept_by_default * 1.001
    assert quiet(case, rows, **more) == config, "the same seed finds the same"
    assert vtc.CompressionConfig.from_json(config.to_json()) == config
    with vtc.compressed(case.model, config) as model:
        model(**rows[0])


def test_the_model_is_left_as_it_was(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    before = set(case.model.__dict__), set(case.model.model.__dict__)
    quiet(case, rows, keep_ratio=0.5, method="todre", trials=2)
    assert (set(case.model.__dict__), set(case.model.model.__dict__)) == before
    assert not vtc.is_compressed(case.model)
    case.model.train()
    with vtc.compressed(case.model, "uniform", keep_ratio=0.25) as model:
        quiet(case, rows, keep_ratio=0.5, method="aim", trials=1)
        assert model.training
        with torch.no_grad():
            model(**rows[0])
        assert vtc.report(model).configs[0].method == "uniform"
    case.model.eval()

    broken = [*rows, {**rows[0], "pixel_values": rows[0]["pixel_values"][:, :2]}]
    with pytest.raises(Exception, match="channel"):
        quiet(case, broken, keep_ratio=0.5, method="aim", trials=1)
    assert (set(case.model.__dict__), set(case.model.model.__dict__)) == before


@pytest.mark.parametrize("method", ["aim", "atp", "todre", "vflowopt"])
def test_images_are_encoded_once(case: tiny.TinyCase, rows: list[dict[str, Any]], method: str) -> None:
    # Whatever the method reads inside the tower: keys, rows of [CLS], relevance at ever other thresholds, pixels.
    runs = []
    handle = case.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        quiet(case, rows, keep_ratio=0.5, method=method, trials=3)
        assert len(runs) == len(rows)
    finally:
        handle.remove()


def test_another_layer_of_the_tower_is_encoded_when_it_is_read(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    runs = []
    handle = case.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    measure = trial(case, rows)
    try:
        for start, expected in ((-2, 1), (-3, 2), (-2, 2), (-3, 2)):
            measure(vtc.CompressionConfig("vtc-cls", keep_ratio=0.5, options={"start_layer": start}))
            assert len(runs) == len(rows) * expected
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("aim", {}),
        ("todre", {"tau": 0.5}),
        ("vtc-cls", {"start_layer": -3}),
        ("vflowopt", {"t": 1.1, "alpha": 0.5, "cell": 2.0}),
    ],
)
def test_what_is_remembered_gives_the_same_answer(
    case: tiny.TinyCase, rows: list[dict[str, Any]], method: str, options: dict[str, Any]
) -> None:
    config = vtc.CompressionConfig(method, keep_ratio=0.5, options=options)
    measure = trial(case, rows)
    first = {"start_layer": -2} if method == "vtc-cls" else {}
    measure(vtc.CompressionConfig(method, keep_ratio=0.25, options=first))
    reused = measure(config)
    states = []
    for row in rows:
        seen = []
        handle = case.model.lm_head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, -1]))
        with torch.no_grad():
            case.model(**row)
            with vtc.compressed(case.model, config):
                case.model(**row)
        handle.remove()
        states.append(torch.nn.functional.cosine_similarity(*seen, dim=0).item())
    assert reused[0] == pytest.approx(sum(states) / len(states), abs=1e-5)


def test_adaptive_methods_are_held_to_the_budget(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    config = quiet(case, rows, keep_ratio=0.6, method="atp", trials=25)
    assert config.keep_tokens is not None, "the thresholds decide"
    assert len(config.options.get("theta_r", (0.5, 0.5, 0.5))) == 3, "one for every place"
    assert trial(case, rows)(config)[1] <= 0.6 * 1.001


def test_an_interrupted_search_goes_on(case: tiny.TinyCase, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    import optuna

    storage = tmp_path / "trials.log"
    more = {"keep_ratio": 0.5, "method": "aim", "storage": storage}
    quiet(case, rows, trials=3, **more)
    quiet(case, rows, trials=5, **more)
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    (study,) = optuna.get_all_study_summaries(backend)
    assert study.n_trials == 5
    tried = [
        tuple(sorted(done.params.items()))
        for done in optuna.load_study(study_name=study.study_name, storage=backend).trials
    ]
    assert len(set(tried)) == 5, "what goes on does not begin again"
    first = quiet(case, rows, trials=5, **more)  # nothing left to try: the best that is on file
    assert first == quiet(case, rows, trials=5, **more)
    for other in ({"damping": 0.1}, {"space": {"damping": Float(0.0, 0.1)}}):
        with pytest.raises(vtc.ConfigError, match="holds trials of another search"):
            quiet(case, rows, trials=5, **more, **other)
    with pytest.raises(vtc.ConfigError, match="holds trials of another search"):
        quiet(case, rows[:2], trials=5, **more)


def test_patience_stops_and_the_plot_is_drawn(case: tiny.TinyCase, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    storage, plot = tmp_path / "trials.log", tmp_path / "search.png"
    quiet(case, rows, keep_ratio=0.5, method="aim", trials=500, patience=2, storage=storage, plot=plot)
    assert storage.read_text().count("\n") < 400
    assert Image.open(plot).size[0] > 300


def test_an_option_that_is_given_is_not_searched(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    config = quiet(case, rows, keep_ratio=0.5, method="aim", trials=3, damping=0.25, iterations=2)
    assert config.options["damping"] == 0.25
    assert config.options["iterations"] == 2


def test_ranges_of_ones_own(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    # 9 is no layer of this model: such trials are passed over.
    space = {"layer": Choice((1, 2, 9))}
    config = quiet(case, rows, keep_ratio=0.5, method="fastv", trials=6, space=space)
    assert config.options.get("layer", 2) in (1, 2)


def test_a_search_in_which_nothing_is_possible_says_so(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(vtc.ConfigError, match=r"none of 3 settings that were tried is possible: .* layer 9"):
        quiet(case, rows, keep_ratio=0.5, method="fastv", trials=3, space={"layer": Choice((9,))})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "divprune"}, vtc.ConfigError, "divprune has no options to search"),
        ({"method": "nonsense"}, vtc.UnsupportedMethodError, "nonsense"),
        ({"keep_ratio": 1.0}, vtc.ConfigError, "keep_ratio"),
        ({"keep_ratio": "0.5"}, vtc.ConfigError, "keep_ratio"),
        ({"trials": 0}, vtc.ConfigError, "trials"),
        ({"trials": 1.5}, vtc.ConfigError, "trials"),
        ({"patience": "2"}, vtc.ConfigError, "patience"),
        ({"seed": -1}, vtc.ConfigError, "seed"),
        ({"sampler": "best"}, vtc.ConfigError, "sampler"),
        ({"space": {"speed": Int(1, 2)}}, vtc.ConfigError, "no option speed"),
        ({"samples": []}, vtc.InputError, "at least one sample"),
        ({"samples": [("picture",)]}, vtc.InputError, "sample 0"),
        ({"samples": [{"input_ids": torch.zeros(1, 3)}]}, vtc.InputError, "no image"),
        ({"samples": [{"input_ids": torch.zeros(2, 3)}]}, vtc.InputError, "one row"),
        ({"storage": "nowhere/trials.log"}, vtc.InputError, "nowhere does not exist"),
        ({"plot": "."}, vtc.InputError, "is a folder"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_mistakes_are_named(
    case: tiny.TinyCase, rows: list[dict[str, Any]], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    merged = {"samples": rows, "keep_ratio": 0.5, "method": "aim", "trials": 1, **arguments}
    with pytest.raises(error, match=message):
        quiet(case, merged.pop("samples"), **merged)


@pytest.mark.parametrize("name", sorted(name for name, cls in selectors().items() if cls.search_space(32, 0.25)))
def test_search_spaces_are_of_real_options(name: str) -> None:
    cls = selectors()[name]
    space = cls.search_space(32, 0.25)
    assert set(space) <= set(cls.options())
    for values in space.values():
        values = values.values if isinstance(values, Each) else values
        assert isinstance(values, (Float, Int, Choice))
        if not isinstance(values, Choice):
            assert values.low < values.high


def test_pictures_are_upright_and_of_8_bits(case: tiny.TinyCase, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Processor:
        chat_template = "text"

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return self.chat_template

        def __call__(self, images: Any, **_: Any) -> Any:
            seen.extend(images)
            return {"input_ids": torch.zeros(1, 3, dtype=torch.long), "pixel_values": torch.zeros(1)}

    path = odd_pictures.write(tmp_path / "photo.png")
    array = np.zeros((4, 4, 3), np.uint8)
    with Image.open(path) as opened:
        prompts(Processor(), [(opened, "?"), (path, "?"), ([array], "?")], case.model)
    assert [odd_pictures.is_right(image) for image in seen[:2]] == [True, True]
    assert seen[2] is array
    with pytest.raises(vtc.InputError, match=r"sample 1: .*gone\.png: no such file"):
        prompts(Processor(), [(path, "?"), (tmp_path / "gone.png", "?")], case.model)


def test_the_command_writes_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vtc import reference

    if not reference.available():
        pytest.skip("vtc-reference is not installed")
    lines = [json.dumps({"image": str(path), "question": "What is there?"}) for path in reference.samples()[:2]]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    output = tmp_path / "config.json"
    command = ["calibrate", str(tmp_path / "samples.jsonl"), "--keep-ratio", "0.25", "--trials", "2", "-o", str(output)]
    command += ["--option", "alpha=0"]
    assert main(command) == 0
    assert "vflowopt" in capsys.readouterr().out
    config = vtc.CompressionConfig.load(output)
    assert config.keep_ratio == 0.25
    assert config.options["alpha"] == 0
    assert config.options["mean"] == pytest.approx((0.485, 0.456, 0.406)), "entropy is that of this processor's pixels"
    (tmp_path / "samples.jsonl").write_text('{"picture": 1}\n')
    assert main(command) == 2
    assert "line 1: expected" in capsys.readouterr().err
