"""Files that were saved before classes and modules had their present names: they load, and go on as they would have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import headwise
import tiny
from headwise.errors import MismatchError
from saved_models import continue_greedily, model_of, policies_of

SAVED = Path(__file__).parent / "saved"
EXPECTED = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
# When these were written, tokens were chosen once.
POLICIES = {
    name: (family, replace(policy, of="prompt") if hasattr(policy, "choose_every") else policy, options)
    for name, (family, policy, options) in policies_of(headwise, headwise.PeakAttention).items()
}


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
        load("peaks", headwise.PeakAttention(recovery=0.7, window=8, of="prompt"))
    with pytest.raises(
        MismatchError, match=r"saved with Recite\(.*\), which chose from the prompt once: of='prompt', not"
    ):
        load("peaks", headwise.PeakAttention(recovery=0.6, window=8))
    with pytest.raises(MismatchError, match=r"saved with Quantized\("):
        load("mixed", headwise.Quantized(headwise.H2O(heavy=0.9, recent=8), 8))


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
