"""Parameters of policies as words."""

from __future__ import annotations

import json

import pytest

from commands import call
from headwise.errors import ConfigurationError
from headwise.policies import H2O, FastGen, StreamingLLM
from headwise.policies.words import build_policy, describe_policy


def test_settings_become_values_of_the_right_type():
    assert build_policy("h2o", None, ["heavy=0.5", "recent=64"]) == H2O(0.5, 64)
    assert build_policy("streamingllm", None, [" window = 1.0 "]) == StreamingLLM(1.0)
    policy = build_policy("fastgen", 0.5, ["normalize=True", "fold=mean", "ladder=special, full", "local=8"])
    assert policy == FastGen(0.5, normalize=True, fold="mean", ladder=("special", "full"), local=8)
    assert build_policy("fastgen", None, ["recovery=1"]) == FastGen(1.0)
    assert build_policy("fastgen") == FastGen(0.95)


def test_rules_in_a_ladder_are_described_by_their_labels():
    policy = FastGen(0.5, ladder=("special", StreamingLLM(8).rungs[0], "full"))
    described = describe_policy(policy)
    assert described["parameters"]["ladder"] == ["special", "sinks+local", "full"]
    json.dumps(described)


@pytest.mark.parametrize(
    "settings", [["window"], ["window="], ["=4"], ["window=x"], ["window=1", "window=2"], [f"window={10**30}"]]
)
def test_bad_settings(settings):
    with pytest.raises(ConfigurationError):
        build_policy("streamingllm", None, settings)


def test_a_former_name_of_a_policy_works_and_its_name_is_said(tmp_path):
    found = call("profile", "--file", tmp_path / "nowhere.txt", "--policy", "recite")
    assert found.code == 2
    note, error = found.err.splitlines()
    assert note == "note: policy 'recite' is now called 'peak-attention'"
    assert error.startswith("error: there is no file")
    assert '"recite"' not in call("policies", "--json").out


def test_what_may_be_none_can_be_said_so():
    assert build_policy("auto", None, ["ratio=0.5", "bytes=none"]).bytes is None
    assert build_policy("auto", None, ["ratio=none", "bytes=4096"]).bytes == 4096
    with pytest.raises(ConfigurationError, match="expected a"):
        build_policy("auto", None, ["ratio=0.5", "window=none"])
