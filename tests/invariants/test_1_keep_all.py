"""Invariant 1: keeping everything is bit-identical to the untouched model."""

from __future__ import annotations

import torch

from tests import tiny
from tests.invariants.matrix import Method, borrowed, over_matrix
from vtc.engine.cache import CACHE


@over_matrix()
@torch.no_grad()
def test_keeping_everything_is_bit_identical(family: tiny.Family, method: Method, attention: str) -> None:
    case = borrowed(family, attention)
    # Eager attention differs by its masks, which differ by the side of the padding. Ragged batches are generated from.
    kinds = ("single", "right_padded", "no_image_row", "mixed") if attention == "sdpa" else ("ragged", "right_padded")
    kinds = tuple(kind for kind in kinds if kind in family.kinds)
    plain = {kind: case.plain(kind) for kind in kinds}
    with method.at(1.0).on(case.model):
        packed = {kind: case.model(**case.batch(kind)) for kind in kinds}
    for kind in kinds:
        assert torch.equal(packed[kind].logits, plain[kind].logits), kind
        assert packed[kind][CACHE].get_seq_length() == plain[kind][CACHE].get_seq_length(), kind


@over_matrix(attentions=("sdpa",))
@torch.no_grad()
def test_generate_keeping_everything_is_bit_identical(family: tiny.Family, method: Method, attention: str) -> None:
    case = borrowed(family, attention)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = case.once(f"generate {options}", lambda: case.model.generate(**case.batch("ragged"), **options))
    with method.at(1.0).on(case.model):
        packed = case.model.generate(**case.batch("ragged"), **options)
    assert torch.equal(packed.sequences, plain.sequences)
    for step, (ours, theirs) in enumerate(zip(packed.logits, plain.logits, strict=True)):
        assert torch.equal(ours, theirs), step


@over_matrix(attentions=("sdpa",))
@torch.no_grad()
def test_prompts_without_pictures_are_bit_identical(family: tiny.Family, method: Method, attention: str) -> None:
    case = borrowed(family, attention)
    plain = case.plain("text_only").logits
    with method.on(case.model):
        assert torch.equal(case.model(**case.batch("text_only")).logits, plain)
