"""`tools/compiled.py`: every cache runs plain and compiled, and takes its turn."""

from __future__ import annotations

import compiled
import pytest
import torch
from soaking.small_models import llama

from cases import EVERYTHING


@pytest.mark.skipif(not EVERYTHING, reason="compiling takes ten seconds")
def test_every_contender_is_timed():
    torch._dynamo.reset()
    torch.manual_seed(0)
    found = compiled.compare(llama(layers=1), batch=2, context=20, steps=3, backend="eager")
    names = {"static", "headwise full", "headwise half"}
    assert found.keys() == {"dynamic", *names, *(f"{name}, compiled" for name in names)}
    assert all(told["step ms"] > 0 and told["first steps s"] >= 0 for told in found.values())
