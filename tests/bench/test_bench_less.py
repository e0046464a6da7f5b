"""The bench with LESS: every cache that evicts runs a second time with kernels."""

from __future__ import annotations

import json

from benching import bench

from less_oracle import FEATURES


def test_what_evicts_runs_once_more_and_holds_the_state_too(folder):
    rounds = ("--context", 40, "--keep", "0.5", "--steps", 2, "--rounds", 1, "--evict-every", 2, "--quantized", "none")
    said = bench("--model", folder, *rounds, "--less-kernels", folder / "kernels", "--json")
    assert said.code == 0, said.err
    found = {m["name"]: m for m in json.loads(said.out)["results"][0]["candidates"]}
    assert list(found) == ["stock", "full", "keep 50%", "keep 50%, LESS"]
    assert found["keep 50%, LESS"]["setting"].startswith("Less(H2O(")
    used = {name: found[name]["after_decode"]["used_bytes"] for name in found if name != "stock"}
    # Of 2 layers and 2 KV heads: features times a value and its mass, in fp32.
    state = 2 * 2 * FEATURES * (8 + 1) * 4
    assert used["keep 50%, LESS"] - used["keep 50%"] == state


def test_random_weights_have_no_kernels():
    said = bench("--shape", "tiny", "--less")
    assert said.code == 2
    assert "--less needs a model" in said.err
