"""Shared fixtures: tiny random models, poisoned memory, and the default model where a test asks for it."""

from __future__ import annotations

import os

# Before triton is imported: its kernels run on the CPU, in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings

from headwise.kernels.backends import choose
from headwise.store import pages

# The models of the tests are small: a second thread gains little, and on a busy machine it costs a lot.
torch.set_num_threads(1)

# How long an example takes depends on who else uses the machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised page memory is NaN (or an absurd column or code), so that whoever reads slack is caught."""
    allocate = pages.empty

    def poisoned(*shape, dtype, device):
        fresh = allocate(*shape, dtype=dtype, device=device)
        if dtype.is_floating_point:
            return fresh.fill_(float("nan"))
        return fresh.fill_(255 if dtype is torch.uint8 else 2**30)

    monkeypatch.setattr(pages, "empty", poisoned)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    """The kernels that every stage must give the same result with; Triton's are slow here and tested apart."""
    return choose(request.param, torch.device("cpu"))
