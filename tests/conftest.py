"""Shared fixtures: tiny random models, poisoned memory, and the default model where a test asks for it."""

from __future__ import annotations

import os
from collections import Counter

# Before triton is imported: its kernels run on the CPU, in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings

from headwise.kernels import choose
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Say which tests stay together where they are spread over processes (`--dist loadgroup`).

    What is slow to make is made once: the default model, the tiny models of a family with what they generated, and
    fixtures of a module. All other tests go wherever there is time, and come last, to fill what the groups leave.
    """
    if not hasattr(config, "workerinput"):
        return
    names = {item: _group(item) for item in items}
    for item, name in names.items():
        if name is not None:
            item.add_marker(pytest.mark.xdist_group(name))
    sizes = Counter(names.values())
    # The default model takes longest; then the larger groups, each in one piece.
    items.sort(key=lambda item: _place(names[item], sizes))


def _group(item):
    if item.get_closest_marker("model"):
        return "default model"
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if "family" in given:
        return f"{item.path.name} {given['family']}"
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    ours = [fixture for each in fixtures for fixture in each if fixture.baseid.startswith("tests")]
    return item.path.name if any(fixture.scope != "function" for fixture in ours) else None


def _place(name, sizes):
    if name is None:
        return 2, 0, ""
    return name != "default model", -sizes[name], name
