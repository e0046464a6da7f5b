"""Shared fixtures: tiny random models, poisoned memory, and the default model where a test asks for it."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from pathlib import Path

# Before triton is imported: its kernels run on the CPU, in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings

from headwise.kernels.backends import choose
from headwise.store import pages
from kernel_inputs import poisoning

# The models of the tests are small: a second thread gains little, and on a busy machine it costs a lot.
torch.set_num_threads(1)

# How long an example takes depends on who else uses the machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised page memory is NaN (or an absurd column or code), so that whoever reads slack is caught."""
    monkeypatch.setattr(pages, "empty", poisoning(pages.empty))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    """The kernels that every stage must give the same result with; Triton's are slow here and tested apart."""
    return choose(request.param, torch.device("cpu"))


# Which tests stay together where they are spread over processes. `xdist_group` marks would say it too, but pytest-xdist
# 3.8 does not see them under pytest 9.2, and says nothing.


def together(nodeid):
    """The name of what a test shares with others; a test that shares nothing is alone.

    What is slow to make is made once: the default model, the tiny models of a family with what they generated, and
    the fixtures of a module.
    """
    path, _, case = nodeid.partition("::")
    if path.endswith("test_default_model.py"):
        return DEFAULT_MODEL
    family = next((each for each in case.partition("[")[2].rstrip("]").split("-") if each in _FAMILIES), None)
    if family is not None:
        return f"{path} {family}"
    shared = _has_shared_fixtures(path) or _has_shared_fixtures(str(Path(path).with_name("conftest.py")))
    return path if shared else nodeid


ROOT = Path(__file__).parent.parent
DEFAULT_MODEL = "the default model"
# First parts of their names: "gpt" is that of three, which does no harm.
_FAMILIES = {"llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt2", "gpt"}


@functools.cache
def _has_shared_fixtures(path):
    text = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
    return re.search(r'scope="(module|session)"', text) is not None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """The default model first, because it takes longest; then what stays together; single tests fill what is left."""
    if not hasattr(config, "workerinput"):
        return
    groups = {item: together(item.nodeid) for item in items}
    sizes = Counter(groups.values())
    items.sort(key=lambda item: (groups[item] != DEFAULT_MODEL, sizes[groups[item]] == 1, -sizes[groups[item]]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return together(nodeid)

    return Together(config, log)
