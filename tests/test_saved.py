"""Files that were saved before classes and modules had their present names: they load, and go on as they would have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import headwise
import tiny
from headwise.errors import MismatchError
from saved_models import continue_greedily, model_of, policies_of

SAVED = Path(__file__).parent / "saved"
EXPECTED = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
POLICIES = policies_of(headwise, headwise.PeakAttention)


def load(name, policy=None):
    family, own, options = POLICIES[name]
    model = model_of(family)
    sizes = {"page_size": 4, "evict_every": 2, "tokenizer": tiny.tokenizer()}
    return model, headwise.HeadwiseCache.load(SAVED / f"{name}.safetensors", model, policy or own, **sizes, **options)


@pytest.mark.parametrize("name", POLICIES)
def test_it_goes_on_as_it_would_have(name):
    model, cache = load(name)
    report = cache.report()
    assert report.used_bytes == EXPECTED[name]["used_bytes"]
    assert [None if kept is None else kept.tolist() for kept in report.kept_tokens] == EXPECTED[name]["kept"]
    assert continue_greedily(model, cache, torch.tensor(EXPECTED[name]["next"]), 12) == EXPECTED[name]["then"]


def test_another_policy_is_still_refused():
    with pytest.raises(MismatchError, match=r"saved with Recite\("):
        load("peaks", headwise.PeakAttention(recovery=0.7, window=8))


def test_former_names_of_classes_and_policies_work_and_say_what_they_are_called_now():
    with pytest.warns(DeprecationWarning, match=r"headwise\.Recite is now headwise\.PeakAttention"):
        assert headwise.Recite is headwise.PeakAttention
    with pytest.warns(DeprecationWarning, match="'recite' is now called 'peak-attention'"):
        assert headwise.create_policy("recite", keep=0.5) == headwise.PeakAttention(keep=0.5)


def test_a_policy_with_former_names_of_hooks_works_and_is_told_their_new_ones():
    with pytest.warns(DeprecationWarning, match=r"Late\.deferred is now needs_all_layers"):

        class Late(headwise.SnapKV):
            @property
            def deferred(self):
                return True

    assert Late(keep=0.5).needs_all_layers
