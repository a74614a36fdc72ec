from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig

import vtc
from vtc.bench import _cache, _models, _overhead, _prefill, _ragged, _tower, _whole_models, prefill
from vtc.bench.timing import Case, Timing, interleave, markdown_table
from vtc.errors import ConfigError
from vtc.notation import parse_stages
from vtc.report.flops import DecoderShape


def small_llava(layers):
    """The benchmark's LLaVA with a decoder that takes milliseconds."""
    return _models._llava(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=32064,
        )
    )


@pytest.fixture(scope="module")
def shape():
    return _models.BenchModel("small", 2, small_llava, _models.llava_prompt, "vtc-cls")


class TestTiming:
    def test_every_round_has_an_order_of_its_own_and_warmup_is_not_counted(self):
        order = []

        def run(name):
            order.append(name)
            return {"work": float(len(order))}

        cases = {name: Case(lambda name=name: run(name)) for name in "abc"}
        timings = interleave(cases, repeats=8, warmup=1)
        rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
        assert len(rounds) == 9
        assert all(sorted(one) == list("abc") for one in rounds)
        assert len({one[0] for one in rounds}) > 1
        assert len({one.index("b") - one.index("a") == 1 for one in rounds}) == 2, "b does not always follow a"
        in_a = tuple(3.0 * number + one.index("a") + 1 for number, one in enumerate(rounds))
        assert timings["a"]["work"].seconds == in_a[1:]
        again = interleave(cases, repeats=8, warmup=1)
        assert [s - 27 for s in again["a"]["work"].seconds] == list(timings["a"]["work"].seconds)

    def test_context_is_around_every_run(self):
        events = []

        @contextmanager
        def around():
            events.append("in")
            yield
            events.append("out")

        def run():
            events.append("run")
            return {"work": 1.0}

        interleave({"a": Case(run, around)}, repeats=1, warmup=1)
        assert events == ["in", "run", "out"] * 2

    def test_median_and_quartiles(self):
        timing = Timing((5.0, 1.0, 3.0, 2.0, 100.0))
        assert timing.median == 3.0
        assert timing.quartiles == (2.0, 5.0)
        assert Timing((7.0,)).quartiles == (7.0, 7.0)

    def test_markdown_table_lines_up(self):
        lines = markdown_table(("name", "x"), [("a", "1.00"), ("longer", "2")]).splitlines()
        assert lines == ["| name   |    x |", "| ------ | ---: |", "| a      | 1.00 |", "| longer |    2 |"]


class TestShapes:
    @pytest.mark.parametrize(
        ("model", "published"),
        [(_models.LLAVA_7B, (4096, 32, 32, 32, 11008)), (_models.QWEN_3B, (2048, 36, 16, 2, 11008))],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_decoders_have_the_published_sizes(self, model, published):
        text = model.config(model.full_depth).get_text_config()
        heads = (text.num_attention_heads, text.num_key_value_heads)
        assert (text.hidden_size, text.num_hidden_layers, *heads, text.intermediate_size) == published

    @pytest.mark.parametrize("visual_tokens", [576, 2880])
    @pytest.mark.parametrize("model", [_models.LLAVA_7B, _models.QWEN_3B], ids=lambda model: model.name)
    def test_prompts_hold_the_tokens_asked_for(self, model, visual_tokens):
        config = model.config(1)
        inputs = model.prompt(config, visual_tokens, 64, torch.Generator().manual_seed(0))
        ids = inputs["input_ids"]
        assert ids.shape == (1, visual_tokens + 64)
        assert int((ids == config.image_token_id).sum()) == visual_tokens

    def test_impossible_number_of_visual_tokens_is_named(self):
        with pytest.raises(ConfigError, match="577"):
            _models.LLAVA_7B.prompt(_models.LLAVA_7B.config(1), 577, 64, torch.Generator())

    def test_tower_emits_what_the_prompt_announces(self, shape):
        model = _models.build(shape, 2, torch.float32, "cpu")
        inputs = _models.prompt(shape, model, 1152, 8)
        assert _prefill.prefill(model, inputs)["prefill"] > 0


class TestPrefill:
    def test_results_hold_the_packed_length_and_the_formula(self, shape):
        model = _models.build(shape, 2, torch.float32, "cpu")
        inputs = _models.prompt(shape, model, 576, 8)
        results = _prefill.measure(
            model,
            inputs,
            shape,
            visual_tokens=576,
            keep_ratios=[0.5, 0.25],
            method="vtc-cls",
            repeats=2,
            warmup=0,
        )
        assert [r["tokens_after"] for r in results] == [8 + 288, 8 + 144]
        decoder = DecoderShape.from_config(model.config.get_text_config())
        assert results[1]["flops_ratio"] == decoder.prefill_flops(584) / decoder.prefill_flops(152)
        for r in results:
            assert r["speed_up"] == pytest.approx(r["whole"]["median"] / r["compressed"]["median"])
            plain, compressed, vision = (r[part]["median"] for part in ("plain", "compressed", "vision"))
            assert r["realised_share"] == pytest.approx(plain / (compressed - vision))
            assert r["realised_share_of_whole_call"] == pytest.approx(plain / compressed)
            assert len(r["compressed"]["seconds"]) == 2
            # Nested within one run, so true however busy the machine is.
            assert all(0 < s < c for s, c in zip(r["selector"]["seconds"], r["compressed"]["seconds"], strict=True))
            assert min(r["vision"]["seconds"]) > 0
        assert not vtc.is_compressed(model)

    def test_methods_inside_the_decoder_are_refused(self, shape):
        model = _models.build(shape, 4, torch.float32, "cpu")
        inputs = _models.prompt(shape, model, 576, 8)
        with pytest.raises(ConfigError, match="fastv drops tokens inside the decoder"):
            _prefill.measure(
                model,
                inputs,
                shape,
                visual_tokens=576,
                keep_ratios=[0.5],
                method="fastv",
                repeats=1,
                warmup=0,
            )
        assert not vtc.is_compressed(model)


class TestOverhead:
    def test_compares_like_with_like(self, shape):
        model = _models.build(shape, 2, torch.float32, "cpu")
        inputs = _models.prompt(shape, model, 576, 8)
        results = _overhead.measure(model, inputs, method="vtc-cls", keep_ratio=0.25, steps=2, repeats=2, warmup=0)
        assert [r["tokens"] for r in results] == [584, 584, 152, 152]
        assert [r["figure"].split(",")[0] for r in results] == ["prefill", "decode step"] * 2
        assert all(len(r["untouched"]["seconds"]) == 2 for r in results)


class TestCommands:
    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("prefill --repeats 0", "--repeats must be an integer from 1 to 10,000, got 0"),
            ("prefill --warmup -1", "--warmup must be an integer from 0 to 10,000, got -1"),
            ("prefill --layers 0", "--layers must be an integer from 1 to 128, got 0"),
            ("prefill --visual-tokens 576 1000000000", "--visual-tokens must be an integer from 1 to 100,000"),
            ("prefill --text-tokens -5", "--text-tokens must be an integer from 1 to 100,000"),
            ("prefill --keep-ratio 0.5 nan", "keep_ratio"),
            ("overhead --layers 1000000", "--layers must be an integer from 1 to 128, got 1000000"),
            ("overhead --steps 0", "--steps must be an integer from 1 to 100,000, got 0"),
            ("overhead --keep-ratio 2", "keep_ratio"),
            ("kernels --repeats 1000000000", "--repeats must be an integer from 1 to 10,000"),
            ("kernels --growth --most-seconds nan", "--most-seconds must be positive and at most 86,400"),
        ],
    )
    def test_absurd_sizes_are_refused_before_a_model_is_built(self, command, message, monkeypatch, capsys):
        from vtc.cli import main

        for module in (_prefill, _overhead):
            monkeypatch.setattr(module, "build", lambda *_: pytest.fail("a model was built"))
        assert main(["bench", *command.split()]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err
        assert printed.err.count("\n") == 1

    def test_options_name_all_models(self):
        assert tuple(_prefill.MODELS) == prefill.MODELS

    def test_options_need_no_torch(self):
        code = "import sys; from vtc.bench import kernels, overhead, prefill; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def test_prefill_prints_a_table_and_writes_its_conditions(self, shape, monkeypatch, tmp_path, capsys):
        from vtc.cli import main

        monkeypatch.setattr(_prefill, "MODELS", {"small": shape})
        out = tmp_path / "prefill.json"
        arguments = ["--visual-tokens", "576", "--keep-ratio", "0.5", "--repeats", "1", "--warmup", "0"]
        assert main(["bench", "prefill", *arguments, "--dtype", "float32", "--json", str(out)]) == 0
        printed = capsys.readouterr().out
        assert "| small, 2 of 2 layers | vtc-cls |" in printed
        assert "640 → 352" in printed
        data = json.loads(out.read_text())
        assert data["conditions"]["versions"]["torch"] == torch.__version__
        assert data["conditions"]["repeats"] == 1
        assert data["results"][0]["tokens_before"] == 640

    def test_cache_prints_a_table_and_measures_what_is_stored(self, shape, monkeypatch, tmp_path, capsys):
        from vtc.cli import main

        monkeypatch.setattr(_cache, "MODELS", {"llava-1.5-7b": shape})
        out = tmp_path / "cache.json"
        sizes = ["--layers", "2", "--visual-tokens", "576", "--steps", "2", "--batch", "1", "2"]
        settings = ["--setting", "random@decoder=0.25", "snapkv=0.25"]
        timing = ["--repeats", "1", "--warmup", "0", "--dtype", "float32", "--json", str(out)]
        assert main(["bench", "cache", *sizes, *settings, *timing]) == 0
        printed = capsys.readouterr().out
        assert "| snapkv=0.25" in printed
        assert "2 of 2 layers" in printed
        data = json.loads(out.read_text())["results"]
        assert [(r["setting"], r["batch"]) for r in data] == [
            (name, rows) for rows in (1, 2) for name in ("untouched", "random@decoder=0.25", "snapkv=0.25")
        ]
        entry = 2 * 2 * 32 * 4  # layers, keys and values, width, bytes
        assert [r["cache_bytes"] for r in data[:3]] == [640 * entry, 208 * entry, 208 * entry]
        assert data[5]["cache_bytes"] == 2 * data[2]["cache_bytes"]
        untouched, dropped, evicted = data[:3]
        left = untouched["cache_bytes"] - evicted["cache_bytes"]
        assert left <= untouched["peak_bytes"] - evicted["peak_bytes"] < 2 * left, "a step copies a layer's entries"
        assert dropped["prefill_peak_bytes"] < evicted["prefill_peak_bytes"]

    def test_overhead_prints_a_table_and_writes_its_conditions(self, shape, monkeypatch, tmp_path, capsys):
        from vtc.cli import main

        monkeypatch.setattr(_overhead, "LLAVA_150M", shape)
        out = tmp_path / "overhead.json"
        arguments = ["--layers", "2", "--steps", "2", "--repeats", "1", "--warmup", "0"]
        assert main(["bench", "overhead", *arguments, "--json", str(out)]) == 0
        assert "keep 25 %, against a plain prompt as long" in capsys.readouterr().out
        assert json.loads(out.read_text())["conditions"]["steps"] == 2


class TestTower:
    def test_settings_are_read_and_mistakes_named(self):
        plan = parse_stages("divprune@vision:11=0.25+random@decoder=0.4")
        assert [(c.method, c.at, c.keep_ratio) for c in plan] == [
            ("divprune", "vision:11", 0.25),
            ("random", "decoder", 0.4),
        ]
        for text, match in (("divprune", "METHOD@SITE"), ("nope@decoder=0.5", "nope"), ("random@sky=0.5", "at must")):
            with pytest.raises(vtc.VtcError, match=match):
                parse_stages(text)

    def test_layers_see_what_is_left(self):
        plan = parse_stages("uniform@pixels=0.5+random@vision:2=0.5+random@decoder=0.1")
        assert _tower.seen_by_layer(plan, 4) == [0.5, 0.5, 0.25, 0.25]

    def test_the_whole_call_is_tower_and_scaled_decoder(self, monkeypatch, capsys):
        def small(layers):
            size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
            tower_size = {"depth": 4, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
            config = _models.qwen_3b_text(layers, tower_size)
            text = {**size, "vocab_size": 151936, "num_hidden_layers": layers}
            text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
            vision = {**config.vision_config.to_dict(), "out_hidden_size": 32}
            return type(config)(text_config=text, vision_config=vision)

        whole = _whole_models.WHOLE_MODELS["qwen2.5-vl-3b"]
        monkeypatch.setitem(
            _whole_models.WHOLE_MODELS, whole.name, dataclasses.replace(whole, config=small, full_depth=6)
        )
        settings = ["--setting", "random@vision:2=0.25+random@decoder=0.4", "--memory", "--clock", "cpu"]
        from vtc.cli import main

        assert main(["bench", "tower", "--visual-tokens", "64", "--repeats", "1", "--warmup", "0", *settings]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "untouched" in lines[2]
        assert "random@vision:2=0.25" in lines[3]
        assert all(line.count(" MiB") == 2 for line in lines[2:4]), "of the tower, and of the call"
        assert "2 decoder layers measured and scaled to all" in lines[-1]

    def test_ragged_crops_are_encoded_in_three_ways(self, monkeypatch, capsys):
        monkeypatch.setattr(_ragged, "LAYERS", 1)
        from vtc.cli import main

        assert main(["bench", "tower", "--ragged", "--repeats", "1", "--warmup", "0", "--dtype", "float32"]) == 0
        assert "60 to 520, one by one" in capsys.readouterr().out

    def test_prompts_have_the_tokens_that_the_towers_make(self):
        for whole in _whole_models.WHOLE_MODELS.values():
            config = whole.config(1)
            inputs = whole.prompt(config, whole.visual_tokens, 8, torch.Generator().manual_seed(0))
            assert int((inputs["input_ids"] == config.image_token_id).sum()) == whole.visual_tokens
            assert whole.side(whole.visual_tokens) >= 336
