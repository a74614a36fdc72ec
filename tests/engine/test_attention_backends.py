"""flash_attention_2 and flex_attention: the code paths that are not sdpa and eager."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.models.pixtral import modeling_pixtral

import vtc
from tests import reference, tiny
from tests.invariants.matrix import METHODS, Method, build, method, over_matrix, sharp, tolerance
from vtc.engine.cache import CACHE

EXACT = tuple(family for family in tiny.FAMILIES if not family.hybrid)
SAY = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

# Flash kernels know causal and padding masks only; transformers' image blocks that see both ways need other attention.
# Earlier releases hand the rows and columns of Pixtral's patches to the kernel, which takes them for packed sequences.
OF_PIXTRAL = () if "cu_seq_lens_q" in inspect.getsource(modeling_pixtral) else ("llava_pixtral", "mistral3")
# Of GLM-4.5V, transformers hands positions (t, h, w) to the kernel, which takes their axes for packed rows.
CAUSAL = tuple(family for family in EXACT if family.name not in ("gemma3", "paligemma", "glm4v_moe", *OF_PIXTRAL))


class FlashCalls:
    """Kernels with the signature and the conventions of flash-attn, in plain PyTorch, that count their calls."""

    def __init__(self) -> None:
        self.fixed = self.packed = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
        """One sequence, (L, H, D); the causal diagonal ends in the lower right corner."""
        repeat = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(repeat, 1)) * (scale or q.shape[-1] ** -0.5)
        if causal:
            past = k.shape[0] - q.shape[0]
            hidden = torch.arange(k.shape[0])[None] > torch.arange(q.shape[0])[:, None] + past
            scores = scores.masked_fill(hidden, -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(repeat, 1))

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        self.fixed += 1
        return torch.stack(
            [self.attend(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)],
        )

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        self.packed += 1
        lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        return torch.cat([self.attend(*part, softmax_scale, causal) for part in parts])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashCalls:
    """transformers believes that flash-attn is loaded."""
    calls = FlashCalls()
    stand_in = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": calls.flash_attn_func,
        "_flash_varlen_fn": calls.flash_attn_varlen_func,
        "_pad_fn": flash_utils._pad_input,
        "_unpad_fn": flash_utils._unpad_input,
        "_process_flash_kwargs_fn": flash_utils._lazy_define_process_function(calls.flash_attn_varlen_func),
    }
    for name, value in stand_in.items():
        monkeypatch.setattr(flash_utils, name, value)
    return calls


def with_flash(family: tiny.Family) -> Any:
    # The setter of the configuration skips the check for an installed kernel, and reaches all parts.
    case = sharp(family)
    case.model.config._attn_implementation = "flash_attention_2"
    for module in case.model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = "flash_attention_2"
    return case


@over_matrix(
    methods=tuple(m for m in METHODS if m.name in ("vtc-cls", "divprune", "fastv", "divprune+fastv")),
    families=CAUSAL,
    attentions=("sdpa",),
)
def test_flash_equals_masking(family: tiny.Family, method: Method, attention: str, flash: FlashCalls) -> None:
    # Flash kernels drop masked keys too, so the reference is the same model on sdpa.
    case, untouched = with_flash(family), sharp(family)
    for kind in ("single", "ragged"):
        inputs = case.batch(kind)
        flash.fixed = flash.packed = 0
        with method.on(case.model) as model:
            ours = model.generate(**inputs, **SAY)
            report = vtc.report(model)
        assert flash.packed if kind == "ragged" else flash.fixed
        expected = reference.Reference.of(untouched.model, inputs, report)
        theirs = expected.logits_along(reference.answers(ours, inputs))
        error = reference.max_error(reference.stacked_logits(ours), theirs)
        assert error <= tolerance(case), kind


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("kind", ["single", "ragged"])
def test_flash_chooses_as_sdpa_does(name: str, kind: str, flash: FlashCalls) -> None:
    kept = []
    for case in (with_flash(tiny.family(name)), sharp(tiny.family(name))):
        chosen = []
        for m in METHODS:
            # In a tower flash attention knows no sizes of merged patches, nor crops that keep different numbers.
            refused = m.tower and (m.merges or (kind == "ragged" and not m.by_ratio))
            if m.applies_to(case.family) and not refused:
                with torch.no_grad(), m.on(case.model) as model:
                    model(**case.batch(kind))
                    chosen.append([segment.kept.tolist() for segment in vtc.report(model).segments])
        kept.append(chosen)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_second_turn_on_flash(name: str, flash: FlashCalls) -> None:
    # Several new tokens on a cache with gaps: the place where packed sequences are suspected.
    case, untouched = with_flash(tiny.family(name)), sharp(tiny.family(name))
    inputs = case.batch("single")
    asked = torch.randint(3, 290, (1, 6), generator=torch.Generator().manual_seed(5))
    with method("divprune+fastv").on(case.model) as model, torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        report = vtc.report(model)
        ours = model(input_ids=asked, **{CACHE: cache}).logits
    masked = reference.Reference.of(untouched.model, inputs, report)
    # Following the question token by token; the first logits are the prompt's own.
    theirs = masked.logits_along(torch.cat([asked, asked[:, :1]], dim=1))[:, 1:]
    assert reference.max_error(ours, theirs) <= tolerance(case)


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3"])
def test_flex_prefill_equals_masking(name: str) -> None:
    # Without its compiler, which needs minutes on a CPU; the block masks are the same. (Decoding fails in torch.)
    case, untouched = build(tiny.family(name)), build(tiny.family(name))
    case.model.set_attn_implementation({"text_config": "flex_attention"})
    inputs = case.batch("ragged")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), method("divprune+fastv").on(case.model) as model:
        ours = model(**inputs, use_cache=False).logits
        report = vtc.report(model)
    expected = reference.Reference.of(untouched.model, inputs, report)
    with torch.no_grad():
        theirs = expected.prefill().logits
    assert reference.max_error(ours[expected.visible], theirs[expected.visible]) <= 2 * tolerance(case)


@pytest.mark.parametrize("kind", ["single", "ragged"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snapkv", {"window": 4, "kernel": 3}),
        ("prefixkv", {}),
        ("h2o", {"at": "cache:decoding", "scope": "all", "recent": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_smaller_caches_under_flash_say_what_they_say_under_sdpa(
    flash: FlashCalls, name: str, options: dict[str, Any], kind: str
) -> None:
    family = tiny.family("qwen2_5_vl")
    said = []
    for case in (sharp(family), with_flash(family)):
        with vtc.compressed(case.model, name, keep_ratio=0.4, **options) as model:
            said.append(model.generate(**case.batch(kind), **SAY))
    assert flash.fixed or flash.packed
    assert torch.equal(said[0].sequences, said[1].sequences)
    assert reference.max_error(torch.stack(said[0].logits), torch.stack(said[1].logits)) <= 1e-5
