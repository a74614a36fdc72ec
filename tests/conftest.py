from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Before transformers is imported: nothing is looked up on a network, and two waiting threads do not spin against
# each other.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter; this must be set before it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> None:
    # torch.manual_seed spends a millisecond on notes for devices that are not there.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_models_come_back_as_they_were() -> Iterator[None]:
    from tests import shared

    yield
    shared.check()


@pytest.fixture
def young_heap() -> Iterator[None]:
    """Full collections look at what the test makes, and no longer at all that is loaded, which takes half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def registries_as_found() -> Iterator[None]:
    """Forget the methods and families that a test registers."""
    from vtc import registry

    tables = [registry._SELECTORS._classes, registry._ADAPTERS._classes]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
