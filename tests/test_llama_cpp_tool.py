"""`tools/llama_cpp_beside.py`: what a cache costs is what its steps take beyond those of a single token."""

from __future__ import annotations

import llama_cpp_beside


def test_costs_by_hand():
    seconds = {
        "f16": [0.030, 0.010, 0.020],
        "f16, one token": [0.009, 0.010, 0.030],
        "q8_0": [0.013, 0.014, 0.050],
        "q8_0, one token": [0.009, 0.001, 0.010],
    }
    assert llama_cpp_beside.costs(seconds, ["f16", "q8_0"]) == {
        "f16": {"step ms": 20.0, "cache ms": 10.0, "against 16 bits": 1.0},
        "q8_0": {"step ms": 14.0, "cache ms": 5.0, "against 16 bits": 0.5},
    }
