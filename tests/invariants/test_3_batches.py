"""Invariant 3: a batch equals its rows run singly; order and padding side do not matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtc
from tests import reference, tiny
from tests.invariants.matrix import METHODS, Method, over_matrix, sharp_borrowed, tolerance

GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
Kept = dict[tuple[int, int], list[int]]


def kept(report: Any) -> Kept:
    """(row, index) to the kept token indices of that image or video."""
    return {(segment.row, segment.index): segment.kept.tolist() for segment in report.segments}


def generated(case: tiny.TinyCase, method: Method, inputs: dict[str, Any]) -> tuple[Tensor, Kept]:
    """Logits (B, 3, V), and what was kept."""
    with method.on(case.model) as model:
        out = model.generate(**inputs, **GREEDY)
        return reference.stacked_logits(out), kept(vtc.report(model))


# A text, one picture, two of other sizes, and two again. The text stands first, so that the first picture does not
# belong to the first row.
_PLACES = (("no_image_row", 0), ("single", 0), ("ragged", 1), ("two_images", 1))
ROWS = tuple(tiny.ROWS[kind][row] for kind, row in _PLACES)


@over_matrix(attentions=("sdpa",))
def test_a_batch_equals_its_rows_in_either_order(family: tiny.Family, method: Method, attention: str) -> None:
    case = sharp_borrowed(family, attention)
    text, *rows = ROWS
    spoken = case.once("a text", lambda: case.model.generate(**case.collate((text,)), **GREEDY))
    alone, choices = [reference.stacked_logits(spoken)], {}
    for row, shown in enumerate(rows, start=1):
        logits, choice = generated(case, method, case.collate((shown,)))
        alone.append(logits)
        choices |= {(row, index): indices for (_, index), indices in choice.items()}
    forward, together = generated(case, method, case.collate(ROWS))
    backward, turned = generated(case, method, case.collate(ROWS[::-1]))
    for batch in (forward, backward.flip(0)):
        errors = [reference.max_error(row[None], single) for row, single in zip(batch, alone, strict=True)]
        assert max(errors) <= tolerance(case, method), errors
    assert together == choices
    assert {(len(ROWS) - 1 - row, index): indices for (row, index), indices in turned.items()} == choices


# Right padding reaches the recurrent state of linear-attention layers, compressed or not.
@over_matrix(families=tuple(family for family in tiny.FAMILIES if not family.hybrid), attentions=("sdpa",))
@torch.no_grad()
def test_padding_side_does_not_matter(family: tiny.Family, method: Method, attention: str) -> None:
    case = sharp_borrowed(family, attention)
    outputs, choices = [], []
    for kind in ("ragged", "right_padded"):
        inputs = case.batch(kind)
        positions = case.model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        inputs["position_ids"] = positions[1:] if positions.dim() == 3 else positions
        real = inputs["attention_mask"].bool()
        with method.on(case.model) as model:
            logits = model(**inputs).logits
            report = vtc.report(model)
        choices.append(kept(report))
        visible = reference.Reference.of(case.model, inputs, report).visible
        outputs.append([logits[row, real[row]][visible[row, real[row]]] for row in range(len(real))])
    assert choices[0] == choices[1]
    for left, right in zip(*outputs, strict=True):
        assert reference.max_error(left, right) <= tolerance(case, method)


@over_matrix(
    methods=tuple(m for m in METHODS if not m.decoder and not m.drawn and not m.reads_text),  # the rows' texts differ
    attentions=("sdpa",),
)
@torch.no_grad()
def test_the_order_of_images_does_not_matter(family: tiny.Family, method: Method, attention: str) -> None:
    # Three different images in one row and backwards in another: every one keeps the same tokens.
    case = sharp_borrowed(family, attention)
    sizes = (0, 1, 2)
    rows = [tiny.Row(20, 4, tuple((None, size) for size in order), 5) for order in (sizes, sizes[::-1])]
    pixels = _same_pixels(case, rows)
    chosen = []
    for inputs in pixels:
        with method.on(case.model) as model:
            model(**inputs)
            chosen.append([indices for _, indices in sorted(kept(vtc.report(model)).items())])
    assert len(chosen[0]) == len(sizes)
    assert chosen[0] == chosen[1][::-1]


def _same_pixels(case: tiny.TinyCase, rows: list[tiny.Row]) -> list[dict[str, Any]]:
    """Inputs of two rows with the same visuals in opposite orders.

    The builder draws pixels in row order, so those of the second row are replaced by those of the first, turned round.
    """
    visuals = case.architecture.visuals[case.family.modality]
    drawn = [
        visuals.tensors(size, torch.Generator().manual_seed(90 + size)) for _, size in sorted(rows[0].visuals, key=str)
    ]
    out = []
    for row in rows:
        inputs = case.collate((row,))
        for name, value in visuals.collate([[drawn[size] for _, size in row.visuals]]).items():
            inputs[name if name in inputs else "pixel_values_images"] = value  # as Video-LLaVA's were once called
        out.append(inputs)
    return out
