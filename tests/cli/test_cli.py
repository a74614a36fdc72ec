from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vtc
from tests import odd_pictures
from vtc.cli import COMMANDS, inspect, main, methods
from vtc.report.views import FITS

TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
SIDE, PATCH = 32, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a LLaVA of 16 visual tokens, its tokenizer and its processor, as a hub checkpoint has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "what", "is", "this", "?", "a", "cup"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=9,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=len(words),
        ),
        image_token_id=words.index("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def failure(capsys, *argv):
    """The one line that a failing command prints on stderr."""
    assert main([*map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"vtc: error: .+\n", captured.err)
    return captured.err


class TestAsk:
    def test_prints_both_answers_and_the_report(self, checkpoint, photo, capsys):
        assert main(["ask", str(photo), "what is this?", "--model", str(checkpoint), "--max-new-tokens", "3"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0] == "what is this?  [photo.png]"
        assert out[1].startswith("  all tokens: ")
        assert out[2].startswith("  4 of 16: ")
        assert out[4] == "vtc(keep_ratio=0.25) on llava"

    def test_options_reach_the_method(self, checkpoint, photo, capsys):
        command = [
            "ask",
            photo,
            "what",
            "--model",
            checkpoint,
            "--method",
            "fastv",
            "-o",
            "layer=1",
            "--keep-tokens",
            5,
        ]
        assert main([*map(str, command), "--max-new-tokens", "1"]) == 0
        out = capsys.readouterr().out
        assert "fastv(keep_tokens=5, layer=1) on llava" in out
        assert re.search(r"visual tokens, layer 0 +16 +16", out)
        assert re.search(r"visual tokens, layers 1-3 +16 +5", out)

    def test_positions_are_passed_on(self, checkpoint, photo, monkeypatch, capsys):
        seen = []
        compressed = vtc.compressed
        monkeypatch.setattr(vtc, "compressed", lambda model, config: seen.append(config) or compressed(model, config))
        command = ["ask", photo, "what", "--model", checkpoint, "--positions", "compact", "--max-new-tokens", 1]
        assert main([*map(str, command)]) == 0
        assert [config.positions for (config,) in seen] == ["compact"]

    def test_stages_in_a_line_are_the_configuration(self, checkpoint, photo, capsys):
        line = "divprune@vision:1=0.5+vtc=0.5 compact"
        command = ["ask", photo, "what", "--model", checkpoint, "--method", line, "--max-new-tokens", 1]
        assert main([*map(str, command)]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[2].startswith("  4 of 16: ")
        assert "divprune(keep_ratio=0.5, at=vision:1" in out

    @pytest.mark.parametrize("beside", [["--keep-ratio", "0.5"], ["--at", "decoder"], ["-o", "width=0.3"]])
    def test_a_line_of_stages_says_everything_else(self, photo, capsys, beside):
        message = failure(capsys, "ask", photo, "what?", "--method", "vtc=0.5", *beside)
        assert "which says it for each stage" in message

    def test_a_command_of_one_stage_refuses_two(self, photo, capsys):
        message = failure(capsys, "inspect", photo, "--method", "resize=0.5+vtc=0.5")
        assert "takes one stage, got 2" in message

    def test_dtype_is_the_one_asked_for(self, checkpoint, photo, capsys):
        command = ["ask", photo, "what", "--model", checkpoint, "--dtype", "bfloat16", "--max-new-tokens", 1]
        assert main([*map(str, command)]) == 0
        assert "llama decoder in bfloat16" in capsys.readouterr().out

    def test_missing_picture(self, tmp_path, capsys):
        path = tmp_path / "gone.png"
        assert f"{path}: no such file" in failure(capsys, "ask", path, "what?")

    def test_file_that_is_no_picture(self, tmp_path, capsys):
        path = tmp_path / "notes.png"
        path.write_text("not pixels")
        assert f"{path}: not a picture" in failure(capsys, "ask", path, "what?")

    @pytest.mark.parametrize("kind", ["png", "jpeg"])
    def test_truncated_picture(self, photo, tmp_path, capsys, kind):
        whole, path = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
        Image.open(photo).save(whole)
        path.write_bytes(whole.read_bytes()[:1000])
        message = failure(capsys, "ask", path, "what?")
        assert str(path) in message
        assert "truncated" in message

    def test_picture_is_upright_and_of_8_bits(self, tmp_path, monkeypatch, capsys):
        seen = []
        monkeypatch.setattr("vtc.cli.arguments.load_model", lambda *_: (None, None))

        def prepare(model, processor, image, question):
            seen.append(image)
            raise vtc.InputError("enough")

        monkeypatch.setattr("vtc.cli.arguments.prepare", prepare)
        path = odd_pictures.write(tmp_path / "photo.png")
        for command in (["ask", path, "what?"], ["inspect", path, "-o", tmp_path / "kept.png"]):
            assert "enough" in failure(capsys, *command)
        assert [odd_pictures.is_right(image) for image in seen] == [True, True]

    def test_folder_that_does_not_exist(self, photo, tmp_path, capsys):
        folder = tmp_path / "nowhere"
        assert f"{folder}: no such folder" in failure(capsys, "ask", photo, "what?", "--model", folder)

    def test_folder_without_a_checkpoint(self, photo, tmp_path, capsys):
        assert f"{tmp_path}: cannot be loaded" in failure(capsys, "ask", photo, "what?", "--model", tmp_path)

    def test_unknown_method_is_refused_before_anything_is_loaded(self, photo, capsys):
        message = failure(capsys, "ask", photo, "what?", "--model", "nowhere", "--method", "divprun")
        assert "divprune" in message

    def test_unknown_option_of_the_method(self, photo, capsys):
        assert "'depth'" in failure(capsys, "ask", photo, "what?", "--method", "fastv", "-o", "depth=3")

    @pytest.mark.parametrize("value", ["0", "-1", "1.5", "nan"])
    def test_ratio_out_of_range(self, photo, capsys, value):
        assert "keep_ratio" in failure(capsys, "ask", photo, "what?", f"--keep-ratio={value}")

    def test_length_of_the_answer_out_of_range(self, photo, capsys):
        for value in (0, -1, 10**9):
            message = failure(capsys, "ask", photo, "what?", f"--max-new-tokens={value}")
            assert f"--max-new-tokens must be an integer from 1 to 100,000, got {value}." in message

    def test_ratio_and_count_together(self, photo, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["ask", str(photo), "what?", "--keep-ratio", "0.5", "--keep-tokens", "4"])
        assert caught.value.code == 2
        assert "not allowed with" in capsys.readouterr().err

    def test_option_without_a_value(self, photo, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["ask", str(photo), "what?", "-o", "layer"])
        assert caught.value.code == 2
        assert "NAME=VALUE" in capsys.readouterr().err

    def test_device_that_is_not_there(self, checkpoint, photo, capsys):
        if torch.cuda.device_count() > 7:
            pytest.skip("this machine has the device")
        message = failure(capsys, "ask", photo, "what?", "--model", checkpoint, "--device", "cuda:7")
        assert "--device cuda:7" in message


class TestLists:
    def test_methods_show_where_they_act_what_they_need_and_where_they_come_from(self, capsys):
        assert main(["methods"]) == 0
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert set(lines) == {"method", *vtc.registry.selectors()}
        assert "entering decoder layer 2" in lines["fastv"]
        assert "text_attention" in lines["fastv"]
        assert "cls_attention" in lines["vtc-cls"]
        assert "arXiv" in lines["divprune"]

    @pytest.mark.parametrize(
        ("layers", "text"),
        [
            ([None], "before the language model"),
            ([3], "entering decoder layer 3"),
            ([None, 2, 9], "before the language model and entering decoder layers 2, 9"),
        ],
    )
    def test_places_of_several_stages_read_as_a_sentence(self, layers, text):
        assert methods.where([vtc.Stage(vtc.DecoderLayer(n) if n else vtc.BeforeDecoder()) for n in layers]) == text

    def test_methods_say_in_which_models_on_what_and_at_what_cost(self, capsys):
        assert main(["methods"]) == 0
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert all(word in lines["fastv"] for word in ("not qwen3_5", "image, video", "N d"))
        assert "qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe" in lines["resize"]
        assert 'with [CLS] or score_source="received"' in lines["visionzip"]
        assert "place, (cls_attention)" in lines["vtc"]
        assert "entering tower layers 1 to 21 in steps of 2" in lines["flowcut"]
        own = [cls for cls in vtc.registry.selectors().values() if cls.__module__.startswith("vtc.")]
        assert all(cls.cost and set(cls.inputs) <= {"image", "video"} for cls in own)

    def test_methods_of_a_name(self, capsys):
        assert main(["methods", "*zip*"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["method", "visionzip"]
        assert main(["methods", "*zap*"]) == 2
        assert "No method matches '*zap*'" in capsys.readouterr().err

    def test_a_table_for_the_readme(self, capsys):
        assert main(["methods", "--markdown", "fastv"]) == 0
        *_, row = capsys.readouterr().out.splitlines()
        assert row.startswith("| `fastv` | Keep, from decoder layer `layer` on,")
        assert row.endswith("| [2403.06764](https://arxiv.org/abs/2403.06764) |")
        assert methods.movable_to(vtc.registry.selectors()["todre"]) == []
        assert methods.movable_to(vtc.registry.selectors()["pool"]) == ["decoder", "decoder:K"]

    def test_models_are_those_with_an_adapter(self, capsys):
        assert main(["models"]) == 0
        names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
        assert names == sorted(vtc.registry.adapters())
        assert {"llava", "qwen2_5_vl", "internvl"} <= set(names)

    def test_methods_loads_no_transformers_and_a_reader_that_leaves_early_sees_no_traceback(self):
        code = "import sys, vtc.cli as cli; sys.exit(cli.main(['methods']) + 10 * ('transformers' in sys.modules))"
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered
        ) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 1, "11 where transformers was imported"

    def test_help_loads_no_library(self):
        code = """
import sys
from vtc.cli import main

for command in sys.argv[1:]:
    try:
        main([*command.split(), "--help"])
    except SystemExit as exit:
        loaded = [name for name in ("torch", "transformers", "numpy", "PIL") if name in sys.modules]
        print(command, exit.code, loaded, file=sys.stderr)
"""
        commands = ["", *COMMANDS, "bench prefill", "bench overhead", "bench kernels", "bench selectors"]
        result = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True)
        assert result.stderr.splitlines() == [f"{command} 0 []" for command in commands]

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"vtc {vtc.__version__}\n"

    def test_no_command(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main([])
        assert caught.value.code == 2
        assert "COMMAND" in capsys.readouterr().err

    def test_help_names_every_command(self, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        listed = re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)
        assert listed == list(COMMANDS)


def test_fits_are_those_of_the_views():
    assert inspect.FITS == FITS
