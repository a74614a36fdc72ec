"""Some examples of the machine in models.py for every family, the same in every run."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.fuzz import models


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family.like is None], ids=str)
def test_a_model_used_for_long_says_what_a_fresh_one_says(family: tiny.Family) -> None:
    models.run(family, examples=2, steps=8)
