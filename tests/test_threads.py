"""One model in several threads and processes, each with a cache of its own: the same as alone."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import models
import tiny
from headwise import (
    H2O,
    CacheStateError,
    FastGen,
    Full,
    HeadwiseCache,
    KVzip,
    MismatchError,
    Quantized,
    SnapKV,
    StreamingLLM,
)
from headwise.hosts.transformers import attachment, switch

TOKENIZER = tiny.tokenizer()
POLICIES = [
    Full(),
    StreamingLLM(window=7, sinks=3),
    H2O(heavy=5, recent=6),
    FastGen(recovery=0.6),
    SnapKV(keep=0.4),
    KVzip(keep=0.4),
    Quantized(H2O(heavy=12, recent=9), 8, recent=4),
    None,
]


def conversation(model, policy, seed, turns=2):
    """Ids of a few turns; without a policy, with transformers' own cache."""
    cache = DynamicCache(config=model.config)
    if policy is not None:
        cache = HeadwiseCache(model, policy, tokenizer=TOKENIZER, evict_every=4)
    ids = models.prompt(30, seed=seed)
    for turn in range(turns):
        ids = torch.cat([ids, models.prompt(5, seed=seed + turn)[:, 1:]], dim=1)
        ids = models.generate(model, ids, cache, max_new_tokens=5)
    return ids


@pytest.fixture
def hasty():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_threads_with_caches_of_their_own_generate_what_they_would_alone(before, hasty):
    model = models.build("gemma3")
    model.set_attn_implementation(before)
    alone = [conversation(model, policy, seed) for seed, policy in enumerate(POLICIES)]
    with ThreadPoolExecutor(len(POLICIES)) as pool:
        found = list(pool.map(lambda seed: conversation(model, POLICIES[seed], seed), range(len(POLICIES))))
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in alone]
    gc.collect()
    assert model.config._attn_implementation == before
    assert "forward" not in vars(model)
    assert "prepare_inputs_for_generation" not in vars(model)


def windowed(module, query, key, value, attention_mask, **options):
    """What a user may have registered: like no other to the bit, and near enough to be served."""
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output * 0.999, weights


class Held:
    """A pass of a cache, in a thread of its own, that waits in its first layer until the block is left."""

    def __init__(self, model, cache):
        self._model, self._cache = model, cache
        self._inside, self._go = threading.Event(), threading.Event()

    def __enter__(self):
        me = []

        def hold(*_):
            if threading.get_ident() in me:
                self._inside.set()
                assert self._go.wait(60)

        def run():
            me.append(threading.get_ident())
            with torch.no_grad():
                self.logits = self._model(models.prompt(), past_key_values=self._cache).logits

        self._handle = self._model.get_decoder().layers[0].register_forward_hook(hold)
        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert self._inside.wait(60)
        return self

    def __exit__(self, *_):
        self._go.set()
        self._thread.join()
        self._handle.remove()


@pytest.mark.parametrize("before", ["eager", "sdpa", "windowed"])
def test_whoever_calls_the_model_during_a_pass_of_ours_has_the_attention_it_had(before):
    ALL_ATTENTION_FUNCTIONS.register("windowed", windowed)
    ALL_MASK_ATTENTION_FUNCTIONS.register("windowed", sdpa_mask)
    model = models.build("llama")
    model.set_attn_implementation(before)
    ids = models.prompt(seed=5)
    with torch.no_grad():
        alone = model(ids).logits
        expected = model(models.prompt()).logits
    cache = HeadwiseCache(model, Full())
    with Held(model, cache) as held, torch.no_grad():
        assert model.config._attn_implementation == before
        assert torch.equal(model(ids).logits, alone)
        assert torch.equal(model(ids, past_key_values=DynamicCache(config=model.config)).logits, alone)
        # A pass of another cache of ours begins and ends meanwhile.
        other = model(ids, past_key_values=HeadwiseCache(model, Full())).logits
        assert torch.equal(model(ids).logits, alone)
    assert model.config._attn_implementation == before
    if before != "windowed":
        torch.testing.assert_close(other, alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(held.logits, expected, atol=1e-4, rtol=1e-4)
    # It was served by headwise all the same.
    assert cache.report().kept_tokens[0].tolist() == [[models.PROMPT] * 2]


def test_one_cache_in_two_threads_at_once_is_refused_and_the_first_goes_on():
    model = models.build("llama")
    cache, alone = (HeadwiseCache(model, H2O(heavy=5, recent=6)) for _ in range(2))
    with torch.no_grad():
        expected = model(models.prompt(), past_key_values=alone).logits
        with Held(model, cache) as held, pytest.raises(CacheStateError, match="pass of another thread"):
            model(models.prompt(), past_key_values=cache)
        assert torch.equal(held.logits, expected)
        after = [model(models.prompt(1), past_key_values=each).logits for each in (cache, alone)]
    assert torch.equal(*after)


def test_caches_come_and_go_in_threads_while_others_are_in_use(hasty):
    model = models.build("llama")
    kept = HeadwiseCache(model, Full())

    def come_and_go(_):
        for _ in range(40):
            HeadwiseCache(model, Full())
        with torch.no_grad():
            return model(models.prompt(9), past_key_values=HeadwiseCache(model, Full())).logits

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(come_and_go, range(4)))
    with torch.no_grad():
        expected = model(models.prompt(9), past_key_values=kept).logits
    assert all(torch.equal(each, expected) for each in found)
    del kept
    gc.collect()
    assert "forward" not in vars(model)
    assert "prepare_inputs_for_generation" not in vars(model)


# Processes.


def test_a_model_goes_to_another_process_without_its_caches():
    model = models.build("llama")
    cache = HeadwiseCache(model, POLICIES[2])
    expected = models.generate(model, models.prompt(), cache)
    copy = pickle.loads(pickle.dumps(model))
    assert copy.forward.__self__ is copy
    assert torch.equal(models.generate(copy, models.prompt(), HeadwiseCache(copy, POLICIES[2])), expected)
    with pytest.raises(MismatchError, match="used by another model"):
        models.generate(copy, expected, cache)


def test_a_process_that_is_forked_has_the_model_and_caches_as_they_were():
    model = models.shared("llama")
    cache, other = (HeadwiseCache(model, POLICIES[2], kernel="cpu", evict_every=3) for _ in range(2))
    ids = models.generate(model, models.prompt(), cache)
    assert torch.equal(models.generate(model, models.prompt(), other), ids)
    following = torch.cat([ids, models.prompt(4)], dim=1)
    expected = models.generate(model, following, other).tolist(), ids.tolist()
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            fresh = HeadwiseCache(model, POLICIES[2], kernel="cpu", evict_every=3)
            found = models.generate(model, following, cache).tolist(), models.generate(model, models.prompt(), fresh)
            os.write(writing, b"same" if (found[0], found[1].tolist()) == expected else b"differs")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"same"
    assert os.waitpid(process, 0)[1] == 0
    # What the child did is nothing to the parent.
    assert models.generate(model, following, cache).tolist() == expected[0]


def test_a_process_may_be_forked_while_another_thread_holds_a_lock():
    model = models.build("llama")
    cache = HeadwiseCache(model, POLICIES[2])
    with switch._LOCK, attachment._LOCK:
        process = os.fork()
        if process == 0:
            signal.alarm(20)
            try:
                models.generate(model, models.prompt(), cache, max_new_tokens=2)
                del cache
                HeadwiseCache(model, POLICIES[2])
                os._exit(0)
            finally:
                os._exit(1)
    assert os.waitpid(process, 0)[1] == 0
