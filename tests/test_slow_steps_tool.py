"""`tools/slow_steps.py`: every step is told by what happens in it."""

from __future__ import annotations

import slow_steps
import torch
from soaking.small_models import llama

import headwise


def test_steps_are_told_by_what_happens_in_them():
    torch.manual_seed(0)
    policy = headwise.Quantized(headwise.SnapKV(keep=20, choose_every=24))
    found = slow_steps.decode(llama(layers=1), None, policy, batch=2, context=40, steps=48)
    # Codes after every sixteenth token, and a choice after every 24th, which the last of them falls together with.
    assert {kind: found[kind]["steps"] for kind in ("choice", "codes")} == {"choice": 2, "codes": 2}
    assert found["usual"]["steps"] == 44 and found["mean ms"] > 0
