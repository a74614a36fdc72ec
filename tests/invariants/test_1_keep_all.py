"""Invariant 1: keeping everything is bit-identical to the untouched model."""

from __future__ import annotations

import torch

from tests import tiny
from tests.invariants.matrix import Method, build, over_matrix
from vtc.engine.cache import CACHE


@over_matrix()
@torch.no_grad()
def test_keeping_everything_is_bit_identical(family: tiny.Family, method: Method, attention: str) -> None:
    case = build(family, attention)
    batches = {kind: case.batch(kind) for kind in family.kinds}
    plain = {kind: case.model(**inputs) for kind, inputs in batches.items()}
    with method.at(1.0).on(case.model):
        packed = {kind: case.model(**inputs) for kind, inputs in batches.items()}
    for kind in family.kinds:
        assert torch.equal(packed[kind].logits, plain[kind].logits), kind
        assert packed[kind][CACHE].get_seq_length() == plain[kind][CACHE].get_seq_length(), kind


@over_matrix(attentions=("sdpa",))
@torch.no_grad()
def test_generate_keeping_everything_is_bit_identical(family: tiny.Family, method: Method, attention: str) -> None:
    case = build(family, attention)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for kind in ("single", "ragged"):
        inputs = case.batch(kind)
        plain = case.model.generate(**inputs, **options)
        with method.at(1.0).on(case.model):
            packed = case.model.generate(**inputs, **options)
        assert torch.equal(packed.sequences, plain.sequences), kind
        for step, (ours, theirs) in enumerate(zip(packed.logits, plain.logits, strict=True)):
            assert torch.equal(ours, theirs), (kind, step)


@over_matrix(attentions=("sdpa",))
@torch.no_grad()
def test_prompts_without_pictures_are_bit_identical(family: tiny.Family, method: Method, attention: str) -> None:
    case = build(family, attention)
    inputs = case.batch("text_only")
    plain = case.model(**inputs).logits
    with method.on(case.model):
        assert torch.equal(case.model(**inputs).logits, plain)
