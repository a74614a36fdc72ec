from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4vConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from vtc.config import CompressionConfig
from vtc.core.selection import Selection
from vtc.core.sites import BeforeDecoder, DecoderLayer
from vtc.errors import UnsupportedModelError
from vtc.report.flops import DecoderShape, block_flops
from vtc.report.report import Report, SegmentReport

VICUNA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


COUNTED = (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    GemmaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    SmolLM3Config,
    PhiConfig,
    Starcoder2Config,
    MixtralConfig,
    Qwen3MoeConfig,
    Glm4vConfig,
)

BEFORE = BeforeDecoder()


def tiny_text(config_class):
    """A model's configuration with a decoder of two layers."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    if config_class is Glm4vConfig:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        tower = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 8, "out_hidden_size": 32}
        return Glm4vConfig(text_config={**sizes, "rope_parameters": rope}, vision_config=tower)
    return config_class(**sizes, **({"head_dim": 16} if config_class is Gemma3TextConfig else {}))


def layer_macs(config, n, layer=0):
    return DecoderShape.from_config(config).layers[layer].macs(n)


class TestFlops:
    def test_vicuna_7b_gives_the_published_figure(self):
        # 32 layers of 4nd^2 + 2n^2d + 3ndm at n = 576: the 3.82 T that token-pruning papers state for LLaVA-1.5-7B.
        shape = DecoderShape.from_config(VICUNA_7B)
        macs = sum(layer.macs(576) for layer in shape.layers)
        assert macs == 32 * (4 * 576 * 4096**2 + 2 * 576**2 * 4096 + 3 * 576 * 4096 * 11008)
        assert macs == pytest.approx(3.817e12, rel=1e-4)
        assert shape.prefill_flops(576) == 2 * macs + 2 * 4096 * 32000

    def test_grouped_query_attention_narrows_keys_and_values_only(self):
        # d = 8, 4 heads of 2, 1 key-value head, m = 10, n = 3:
        # query and output 2 * 8*8, key and value 2 * 8*2, MLP 3 * 8*10, scores and values 2 * 3*3 * 8.
        config = Qwen2Config(
            hidden_size=8, num_attention_heads=4, num_key_value_heads=1, intermediate_size=10, num_hidden_layers=1
        )
        assert layer_macs(config, 3) == 3 * (128 + 32 + 240) + 144

    def test_head_dim_need_not_divide_the_width(self):
        # d = 8, 2 heads of 16: the query is wider than the hidden state.
        text = {
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 4,
            "num_hidden_layers": 1,
        }
        config = Qwen3VLConfig(text_config=text).get_text_config()
        assert config.model_type == "qwen3_vl_text"
        assert layer_macs(config, 5) == 5 * (2 * 8 * 32 + 2 * 8 * 16 + 3 * 8 * 4) + 2 * 25 * 32

    def test_plain_mlp_has_two_matrices(self):
        config = PhiConfig(hidden_size=8, num_attention_heads=2, intermediate_size=10, num_hidden_layers=1)
        assert layer_macs(config, 3) == 3 * (4 * 64 + 2 * 80) + 2 * 9 * 8

    def test_sliding_layers_reach_no_further_than_their_window(self):
        config = Gemma3TextConfig(
            hidden_size=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            intermediate_size=4,
            num_hidden_layers=2,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        )
        linear = 10 * (2 * 64 + 2 * 32 + 3 * 32)
        assert layer_macs(config, 10, layer=0) == linear + 2 * 10 * 6 * 8
        assert layer_macs(config, 10, layer=1) == linear + 2 * 10 * 10 * 8
        shape = DecoderShape.from_config(config)
        assert [layer.cached_values(10) for layer in shape.layers] == [2 * 5 * 4, 2 * 10 * 4]
        assert [layer.cached_values(3) for layer in shape.layers] == [2 * 3 * 4, 2 * 3 * 4]

    @pytest.mark.parametrize(("window", "reach"), [(None, 10), (6, 6)])
    def test_mistral_window_holds_in_every_layer(self, window, reach):
        config = MistralConfig(
            hidden_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=4,
            num_hidden_layers=1,
            sliding_window=window,
        )
        assert layer_macs(config, 10) == 10 * (4 * 64 + 3 * 32) + 2 * 10 * reach * 8

    def test_mixture_counts_router_and_active_experts(self):
        config = MixtralConfig(
            hidden_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=10,
            num_hidden_layers=1,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
        assert layer_macs(config, 3) == 3 * (4 * 64 + 8 * 4 + 2 * 240) + 2 * 9 * 8

    def test_sparse_and_dense_layers_of_a_qwen3_mixture(self):
        config = Qwen3MoeConfig(
            hidden_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
            intermediate_size=10,
            moe_intermediate_size=5,
            num_hidden_layers=4,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
        )
        dense, sparse = 240, 32 + 2 * 120
        shape = DecoderShape.from_config(config)
        assert [layer.mlp_macs for layer in shape.layers] == [dense, sparse, dense, dense]

    @pytest.mark.parametrize("config_class", COUNTED, ids=lambda config_class: config_class.model_type)
    def test_formula_equals_the_flops_torch_counts_in_the_real_model(self, config_class):
        from torch.utils.flop_counter import FlopCounterMode

        config = tiny_text(config_class)
        if config_class is Glm4vConfig:
            model = transformers.Glm4vForConditionalGeneration(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        # One dense matrix product for scores and one for values; experts one by one.
        model.eval().set_attn_implementation("eager")
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(input_ids=torch.arange(7)[None], logits_to_keep=1, use_cache=False)
        # The rotary table is a product of a (head_dim/2, 1) by a (1, n) matrix: no part of the formula.
        rotary = _rotary_flops(model.get_decoder(), n=7)
        shape = DecoderShape.from_config(config.get_text_config())
        assert counter.get_total_flops() - rotary == shape.prefill_flops(7)

    def test_unknown_architecture_is_named(self):
        with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*covers decoders"):
            DecoderShape.from_config(transformers.GPT2Config())

    @pytest.mark.parametrize("config_class", [Phi3Config, DeepseekV3Config, Gemma3nTextConfig])
    def test_layers_of_other_matrices_are_refused(self, config_class):
        # Queries, keys and values of one matrix; of low rank; further matrices beside attention and MLP.
        with pytest.raises(UnsupportedModelError, match=config_class.model_type):
            DecoderShape.from_config(config_class())

    def test_reading_the_shape_leaves_no_trace(self):
        config = LlamaConfig(num_hidden_layers=1, dtype="bfloat16", quantization_config={"bits": 4})
        before, state = config.to_dict(), torch.get_rng_state()
        DecoderShape.from_config(config)
        assert config.to_dict() == before
        assert config._attn_implementation_internal is None
        assert torch.equal(torch.get_rng_state(), state)

    def test_layers_that_are_not_attention_are_named(self):
        config = Qwen2Config(num_hidden_layers=2)
        config.layer_types = ["linear_attention", "full_attention"]
        with pytest.raises(UnsupportedModelError, match="linear_attention"):
            DecoderShape.from_config(config)


def _rotary_flops(decoder, n):
    from torch.utils.flop_counter import FlopCounterMode

    total = 0
    for module in decoder.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            positions, x = torch.arange(n)[None], torch.zeros(1, n, decoder.config.hidden_size)
            if hasattr(module, "mrope_section"):  # time, height and width
                positions = positions.expand(3, 1, n)
            kinds = [None] if type(module).__name__ != "Gemma3RotaryEmbedding" else set(decoder.config.layer_types)
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), counter:
                for kind in kinds:
                    module(x, positions, *([] if kind is None else [kind]))
            total += counter.get_total_flops()
    return total


def build(**changes):
    """Rows of 8 visual + 4 text and 6 visual + 2 text tokens, halved before layer 0 and the first again at layer 1."""
    text = LlamaConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=4,
        num_hidden_layers=2,
        vocab_size=10,
    )
    segments = [
        SegmentReport(
            row=0,
            index=0,
            modality="image",
            tokens_before=8,
            tokens_after=2,
            structural=0,
            grids=((1, 2, 4),),
            selections=(
                (BEFORE, Selection(n=8, keep=torch.tensor([0, 2, 4, 6]))),
                (DecoderLayer(1), Selection(n=4, keep=torch.tensor([0, 3]))),
            ),
            kept=torch.tensor([0, 6]),
        ),
        SegmentReport(
            row=1,
            index=0,
            modality="image",
            tokens_before=6,
            tokens_after=3,
            structural=0,
            grids=((1, 2, 3),),
            selections=((BEFORE, Selection(n=6, keep=torch.tensor([0, 1, 5]))),),
            kept=torch.tensor([0, 1, 5]),
        ),
    ]
    arguments = {
        "configs": [CompressionConfig(method="random", keep_ratio=0.5), CompressionConfig("fastv", keep_ratio=0.5)],
        "model_type": "llava",
        "text_config": text,
        "segments": segments,
        "lengths_before": [12, 8],
        "lengths_per_layer": [[8, 5], [6, 5]],
        "spent": {DecoderLayer(1): 0.25, BeforeDecoder(): 1.0},
        "dtype": torch.bfloat16,
        "transformers_version": transformers.__version__,
    }
    return Report.build(**(arguments | changes))


class TestReport:
    def test_flops_and_bytes_per_layer_by_hand(self):
        report = build()
        # Linear part per token 2*8*8 + 2*8*4 + 3*8*4 = 288 MACs, attention 2*8*n^2 = 16 n^2.
        macs = {n: 288 * n + 16 * n * n for n in (12, 8, 5, 6)}
        assert report.flops_before == (2 * (macs[12] + macs[8]),) * 2
        assert report.flops_after == (2 * (macs[8] + macs[5]), 2 * (macs[6] + macs[5]))
        assert report.head_flops == 2 * 2 * 8 * 10
        assert report.prefill_flops_after == sum(report.flops_after) + 320
        # Keys and values of one head of 4, two bytes each: 16 bytes per token and layer.
        assert report.kv_bytes_before == (16 * 20, 16 * 20)
        assert report.kv_bytes_after == (16 * 13, 16 * 11)

    def test_visual_tokens_per_layer_and_their_mean(self):
        report = build()
        assert (report.visual_tokens_before, report.visual_tokens_after) == (14, 5)
        assert report.visual_tokens_per_layer == (7, 5)
        assert report.average_visual_tokens == 6.0

    def test_text_is_an_aligned_table(self):
        lines = str(build()).splitlines()
        assert lines[0] == "random(keep_ratio=0.5) then fastv(keep_ratio=0.5) on llava"
        table = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines[1:-1]}
        assert table["row 0 image 0, tokens"] == "25.0 %"
        assert table["row 1, prompt in the last layer"] == "62.5 %"
        assert table["visual tokens, layer 0"] == "50.0 %"
        assert table["visual tokens, mean over layers"] == "42.9 %"
        assert table["selector at decoder"] == "1.00 ms"
        assert table["selector at decoder:1"] == "0.25 ms"
        assert lines[-1].startswith("llama decoder in bfloat16, vtc ")
        ends = {line.rindex("%") for line in lines[1:] if "%" in line}
        assert len(ends) == 1

    def test_dictionary_survives_json(self):
        report = build()
        data = json.loads(json.dumps(report.to_dict()))
        assert data["versions"]["transformers"] == transformers.__version__
        assert data["segments"][0]["kept"] == [0, 6]
        assert data["segments"][0]["selections"][1]["site"] == "decoder:1"
        assert data["configs"][0]["method"] == "random"
        assert data["dtype"] == "bfloat16"
        assert data["prefill_flops_after"] == report.prefill_flops_after
        assert data["lengths_per_layer"] == [[8, 5], [6, 5]]

    def test_unknown_decoder_reports_tokens_and_says_why_no_flops(self):
        text = transformers.GPT2Config(n_layer=2)
        report = build(text_config=text)
        assert report.prefill_flops_before is None
        assert report.total_kv_bytes_after is None
        assert report.average_visual_tokens == 6.0
        assert "'gpt2'" in str(report)
        assert "prefill FLOPs" not in str(report)
        json.dumps(report.to_dict())

    def test_lengths_must_cover_every_layer_and_row(self):
        with pytest.raises(ValueError, match="2 layers of 2 rows"):
            build(lengths_per_layer=[[8, 5]])
        with pytest.raises(ValueError, match="2 layers of 2 rows"):
            build(lengths_per_layer=[[8, 5], [6]])

    def test_no_picture_at_all(self):
        report = build(segments=[], lengths_per_layer=[[12, 8], [12, 8]])
        assert report.average_visual_tokens == 0.0
        assert report.flops_before == report.flops_after
        assert "100.0 %" in str(report)

    def test_qwen2_vl_text_configuration_is_known(self):
        text = Qwen2VLConfig().get_text_config()
        shape = DecoderShape.from_config(text)
        assert len(shape.layers) == text.num_hidden_layers
        assert all(layer.window is None for layer in shape.layers)

    def test_sites_with_their_tokens_and_times(self):
        report = build(tower_flops=(4_000_000, 1_000_000))
        assert report.selector_ms == 1.25
        assert report.sites == ((BEFORE, 14, 7), (DecoderLayer(1), 4, 2))
        text = str(report)
        assert "at decoder:1, tokens" in text
        assert "tower FLOPs, M" in text
        assert report.to_dict()["sites"][1] == {"site": "decoder:1", "came": 4, "left": 2, "selector_ms": 0.25}


def test_flops_of_a_layer_of_a_tower_by_hand():
    tower = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    (layer,) = (module for module in tower.modules() if type(module).__name__ == "CLIPEncoderLayer")
    # Four projections of 8 x 8 and two matrices of 8 x 16 per token; two products of 8 per pair of a query and a key.
    assert block_flops(layer, 10, 58) == 2 * (10 * (4 * 64 + 2 * 128) + 2 * 58 * 8)
