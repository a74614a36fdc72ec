"""Loss and gradients of a compressed model are those of the masked model."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import vtc
from tests import reference, tiny
from tests.invariants.matrix import METHODS, Method, over_matrix, over_representatives, sharp

EXACT = tuple(family for family in tiny.FAMILIES if not family.hybrid)
GRADIENT_BOUND = 1e-5
"""Relative L2 over all parameters; transformers' float32 norms are rounded differently in longer sequences."""


def labelled(inputs: dict[str, Any]) -> dict[str, Any]:
    """Labels on text whose predecessor is text: a dropped token predicts nothing."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = (ids == tiny.IMAGE) | (ids == tiny.VIDEO)
    follows = torch.nn.functional.pad(visual[:, :-1] | ~real[:, :-1], (1, 0), value=True)
    return {**inputs, "labels": ids.masked_fill(visual | ~real | follows, -100)}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two sets of gradients."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    size = sum(float(theirs[name].double().square().sum()) for name in theirs)
    assert size > 0
    return (difference / size) ** 0.5


@pytest.mark.parametrize("kind", ["ragged", "right_padded"])
@over_matrix(
    methods=tuple(m for m in METHODS if m.name in ("divprune", "divprune+fastv")),
    families=EXACT,
    attentions=("sdpa",),
)
def test_loss_and_gradients_equal_masking(family: tiny.Family, method: Method, attention: str, kind: str) -> None:
    case = sharp(family)
    case.model.train()
    inputs = labelled(case.batch(kind))
    if family.architecture == "paligemma":
        inputs["token_type_ids"] = (inputs["labels"] != -100).long()
    with method.on(case.model) as model:
        ours = model(**inputs, use_cache=False).loss
        ours.backward()
        report = vtc.report(model)
    mine = gradients(case.model)
    theirs = reference.Reference.of(case.model, inputs, report).prefill(use_cache=False).loss
    theirs.backward()
    assert abs(float(ours.detach() - theirs.detach())) <= 1e-6
    assert distance(mine, gradients(case.model)) <= GRADIENT_BOUND


@pytest.mark.parametrize("reentrant", [True, False])
@over_representatives("divprune", "fastv", "divprune+fastv")
def test_gradient_checkpointing_changes_nothing(family: tiny.Family, method: Method, reentrant: bool) -> None:
    case = sharp(family)
    case.model.train()
    inputs = labelled(case.batch("ragged"))
    results = []
    with method.on(case.model) as model:
        for checkpointed in (False, True):
            if checkpointed:
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable({"use_reentrant": reentrant})
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            results.append((float(loss.detach()), gradients(model), vtc.report(model)))
    (plain, first, before), (recomputed, second, after) = results
    assert plain == recomputed
    assert distance(first, second) <= GRADIENT_BOUND
    assert [s.kept.tolist() for s in before.segments] == [s.kept.tolist() for s in after.segments]


@over_representatives("divprune+fastv")
def test_a_step_of_training_moves_the_kept(family: tiny.Family, method: Method) -> None:
    # Nothing of one step survives into the next: the second loss is that of a fresh model with the new weights.
    case = sharp(family)
    inputs = labelled(case.batch("ragged"))
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    with method.on(case.model) as model:
        model.train()
        first = model(**inputs, use_cache=False).loss
        first.backward()
        optimizer.step()
        second = float(model(**inputs, use_cache=False).loss.detach())
    compressed = sharp(family)
    compressed.model.load_state_dict(case.model.state_dict())
    compressed.model.train()
    with method.on(compressed.model) as model:
        fresh = float(model(**inputs, use_cache=False).loss.detach())
    assert second == fresh
    assert second < float(first.detach())


@pytest.mark.usefixtures("young_heap")
@over_representatives("divprune", "fastv", "aim", "vflowopt")
def test_a_forward_pass_leaves_nothing_of_its_graph_or_its_cache(family: tiny.Family, method: Method) -> None:
    case = sharp(family)
    case.model.train()
    inputs = case.batch("ragged")
    with method.on(case.model) as model:
        gc.collect()
        before = {id(thing) for thing in gc.get_objects() if isinstance(thing, torch.Tensor)}
        cache = DynamicCache(config=model.config.get_text_config())
        assert model(**inputs, past_key_values=cache, use_cache=True).logits.requires_grad
        cache = weakref.ref(cache)
        gc.collect()
        assert cache() is None
        left = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and id(thing) not in before]
        assert not [tensor.shape for tensor in left if tensor.requires_grad]
        # What stays is what the report needs: indices and masks of the prompt.
        assert sum(tensor.untyped_storage().nbytes() for tensor in left) < 40 * inputs["input_ids"].numel() * 8
        copied = copy.deepcopy(model)
        with torch.no_grad():
            assert torch.equal(copied(**inputs).logits, model(**inputs).logits)
