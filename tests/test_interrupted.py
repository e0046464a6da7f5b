"""Passes that an error or the user breaks off anywhere: the model works, the cache is refused until it is reset."""

from __future__ import annotations

import contextlib
import copy
import os
import sys

import pytest
import torch

import models
import tiny
from contract import decoder_layers
from headwise import H2O, CacheStateError, FastGen, Full, HeadwiseCache, KVzip, Quantized
from headwise.hosts.transformers.attention import active_cache

TOKENIZER = tiny.tokenizer()
POLICIES = [Full(), H2O(heavy=5, recent=6), FastGen(recovery=0.6), KVzip(keep=0.4), Quantized(Full(), 8, recent=4)]
SETTING = {"evict_every": 1, "page_size": 4, "kernel": "reference"}


def new_cache(model, policy):
    return HeadwiseCache(model, policy, tokenizer=TOKENIZER, **SETTING)


def interrupted_at(event, work):
    """Run that, and interrupt it at that call of a function, of Python or C; returns how many it made."""
    made = 0

    def watch(_frame, what, function):
        nonlocal made
        # The interpreter lets no signal in before a lock is given back.
        if what.endswith("call") and getattr(function, "__name__", "") != "__exit__":
            made += 1
            if made == event:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return made


def assert_as_before(model, ids, expected_stock):
    assert active_cache.get() is None
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, expected_stock)


@pytest.fixture(autouse=True)
def without_gradients():
    # Not as a context: it would be interrupted too.
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def goes_on(model, cache, ids):
    """The logits, or None where the cache is refused."""
    try:
        return model(ids, past_key_values=cache).logits
    except CacheStateError:
        return None


PROMPT = torch.cat([models.prompt(20), models.prompt(20, seed=1)])
NEXT = torch.tensor([[11], [47]])
WAYS = {
    "prompt": lambda model, cache: (cache.reset(), model(PROMPT, past_key_values=cache)),
    "step": lambda model, cache: model(NEXT, past_key_values=cache),
    "turn": lambda model, cache: model(PROMPT[:, :7], past_key_values=cache),
    "reorder": lambda _, cache: cache.reorder_cache(torch.tensor([1, 0])),
    "crop": lambda _, cache: cache.crop(-3),
    "copy": lambda _, cache: copy.deepcopy(cache),
}
ALL = os.environ.get("HEADWISE_ALL_CASES") == "1"
CASES = [("gemma3", POLICIES[1]), ("llama", POLICIES[3]), ("llama", POLICIES[4])]


@pytest.mark.filterwarnings("ignore:the first 20 tokens")
# An interruption that falls into what is called while something is freed is not raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "policy"), CASES, ids=str)
def test_an_interruption_anywhere_is_noticed_or_has_changed_nothing(family, policy, way):
    model, work = models.shared(family), WAYS[way]
    if way == "crop":
        model, policy = models.shared("llama"), Full()
    expected_stock = model(models.prompt(9)).logits

    def filled():
        cache = new_cache(model, policy)
        model(PROMPT, past_key_values=cache)
        return cache

    done = filled()
    calls = interrupted_at(0, lambda: work(model, done))
    # As if it had not begun, or as if it had come just after its end.
    expected = [goes_on(model, cache, NEXT) for cache in (filled(), done)]
    refused = 0
    for event in range(1 + calls % 3, calls + 1, max(1, calls // (40 if ALL else 6))):
        cache = filled()
        with contextlib.suppress(KeyboardInterrupt):
            interrupted_at(event, lambda cache=cache: work(model, cache))
        assert_as_before(model, models.prompt(9), expected_stock)
        found = goes_on(model, cache, NEXT)
        if way == "prompt" and found is not None:
            # It had just been reset.
            continue
        assert found is None or any(torch.equal(found, each) for each in expected), event
        refused += found is None
        cache.reset()
        model(PROMPT, past_key_values=cache)
        assert torch.equal(goes_on(model, cache, NEXT), expected[0])
    assert refused


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("family", ["gemma3"])
def test_a_pass_that_a_layer_breaks_off_is_noticed_and_reset_recovers(family, policy, layer, error):
    model = models.shared(family)
    cache = new_cache(model, policy)
    expected_stock = model(models.prompt(9)).logits
    for ids in (PROMPT, NEXT):

        def fail(*_):
            raise error("in a layer")

        handle = decoder_layers(model)[layer].register_forward_hook(fail)
        with pytest.raises(error, match="in a layer"):
            model(ids, past_key_values=cache)
        handle.remove()
        assert_as_before(model, models.prompt(9), expected_stock)
        for refused in (
            lambda: model(NEXT, past_key_values=cache),
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            lambda: copy.deepcopy(cache),
            lambda: cache.save("nowhere"),
        ):
            with pytest.raises(CacheStateError, match=r"broken off half-way: reset\(\)"):
                refused()
        cache.reset()
        model(PROMPT, past_key_values=cache)
    again = new_cache(model, policy)
    model(PROMPT, past_key_values=again)
    assert torch.equal(*(model(NEXT, past_key_values=each).logits for each in (cache, again)))


def test_a_pass_that_fails_before_its_first_layer_has_changed_nothing():
    model = models.shared("llama")
    cache, other = (new_cache(model, POLICIES[1]) for _ in range(2))
    for each in (cache, other):
        model(PROMPT, past_key_values=each)
    with pytest.raises(IndexError):
        model(NEXT + models.VOCABULARY, past_key_values=cache)
    assert torch.equal(*(model(NEXT, past_key_values=each).logits for each in (cache, other)))
