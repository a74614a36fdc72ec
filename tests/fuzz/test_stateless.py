"""Some examples of every property in stateless.py, the same in every run."""

from __future__ import annotations

import pytest

from tests.fuzz import stateless


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part in stateless.PROPERTIES for name in stateless.PROPERTIES[part]]
)
def test_only_answers_and_errors_of_this_package_come_out(part: str, name: str) -> None:
    stateless.run(part, name)
