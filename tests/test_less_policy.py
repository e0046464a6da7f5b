"""LESS around a policy: what it passes on, and how it is written and read."""

from __future__ import annotations

import json

import pytest

import headwise
from headwise.errors import ConfigurationError, InputError
from headwise.less.checkpoint import shipped_kernels
from headwise.policies.words import describe_policy, parse_policy
from less_oracle import kernels_of, networks_of
from less_saved import model, saved

__all__ = ["model", "saved"]

H2O = headwise.H2O(heavy=0.1, recent=0.1)
LADDER = headwise.FastGen(0.95, ladder=("special", "full"), local=8)


# Policy.


def test_it_chooses_as_the_policy_does():
    for policy in (H2O, headwise.FastGen(0.9), headwise.PyramidKV(keep=64), headwise.KVzip(keep=0.5)):
        less = headwise.Less(policy)
        # All else that is asked of a policy that chooses is asked of the policy itself.
        for name in ("rungs", "facts", "precision"):
            assert getattr(less, name) == getattr(policy, name), name
        assert less.chooser is policy
        assert less.layers == {}
        assert not less.trained


def test_it_is_written_as_python_would_build_it(model):
    assert str(headwise.Less(H2O)) == "Less(H2O(heavy=0.1, recent=0.1))"
    assert str(headwise.Less(H2O, "there")) == "Less(H2O(heavy=0.1, recent=0.1), kernels='there')"
    kernels = kernels_of(model, networks_of(model))
    assert str(headwise.Less(H2O, kernels)) == f"Less(H2O(heavy=0.1, recent=0.1), kernels={kernels!r})"
    assert json.loads(json.dumps(describe_policy(headwise.Less(H2O, kernels)))) == {
        "name": "less",
        "parameters": {
            "policy": {"name": "h2o", "parameters": {"heavy": 0.1, "recent": 0.1, "of": "seen"}},
            "kernels": repr(kernels),
        },
    }


def test_a_budget_is_the_policys():
    assert headwise.Less(headwise.SnapKV(keep=9)).with_keep(5) == headwise.Less(headwise.SnapKV(keep=5))
    with pytest.raises(ConfigurationError, match="full has no budget"):
        headwise.Less(headwise.Full()).with_keep(5)


@pytest.mark.parametrize("wrapped", [headwise.Less(H2O), headwise.Less(H2O, "there")], ids=str)
def test_one_memory_is_enough(wrapped):
    with pytest.raises(ConfigurationError, match=r"Less wraps a policy such as H2O\(keep=0.05\), got Less"):
        headwise.Less(wrapped)


def test_two_with_kernels_can_be_compared(model, saved):
    one, other = headwise.Less(H2O, saved).load(model), headwise.Less(H2O, saved).load(model)
    assert one != other
    assert repr(one) == repr(other)
    assert len({one, other}) == 2


def test_kernels_that_did_not_come_with_headwise_are_asked_for(model, saved, monkeypatch):
    monkeypatch.setattr("headwise.policies.less.shipped_kernels", lambda: saved)
    assert list(headwise.Less(H2O).load(model).layers) == [0, 1, 2]
    monkeypatch.setattr("headwise.policies.less.shipped_kernels", lambda: saved / "nothing")
    with pytest.raises(InputError, match=r"no kernels of LESS in .*`headwise train-less` makes one"):
        headwise.Less(H2O).load(model)
    assert shipped_kernels().parent.name == "less"


def test_kernels_know_which_policies_they_have_seen(model):
    kernels = kernels_of(model, networks_of(model), policies=("h2o:heavy=0.05,recent=0.05", "streamingllm"))
    assert headwise.Less(H2O, kernels).trained
    assert headwise.Less(headwise.StreamingLLM(64), kernels).trained
    assert not headwise.Less(headwise.Window(64), kernels).trained


# As words.


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("h2o:heavy=0.1,recent=0.1+less", headwise.Less(H2O)),
        ("h2o:heavy=0.1,recent=0.1+less=some/where", headwise.Less(H2O, "some/where")),
        ("h2o:heavy=0.1,recent=0.1 +less= a,b=c ", headwise.Less(H2O, "a,b=c")),
        ("full+less", headwise.Less(headwise.Full())),
        ("fastgen:ladder=special,full,local=8+less", headwise.Less(LADDER)),
        ("h2o:heavy=0.1,recent=0.1", H2O),
    ],
)
def test_a_policy_that_remembers_as_words(spec, policy):
    assert parse_policy(spec) == policy


@pytest.mark.parametrize("spec", ["full+lesser", "full+less:there", "full+less there"])
def test_what_stands_behind_less_must_be_a_folder(spec):
    with pytest.raises(
        ConfigurationError, match=r"stands \+less, \+less=FOLDER, \+match, \+match:PARAMETER=VALUE or \+BITS"
    ):
        parse_policy(spec)
