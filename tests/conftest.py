"""Shared fixtures: tiny random models, poisoned memory, and the default model where a test asks for it."""

from __future__ import annotations

import pytest
import torch

from headwise import store

# The models of the tests are small: a second thread gains little, and on a busy machine it costs a lot.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised page memory is NaN (or an absurd column), so that whoever reads slack is caught."""
    allocate = store.empty

    def poisoned(*shape, dtype, device):
        fresh = allocate(*shape, dtype=dtype, device=device)
        return fresh.fill_(float("nan")) if dtype.is_floating_point else fresh.fill_(2**30)

    monkeypatch.setattr(store, "empty", poisoned)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
