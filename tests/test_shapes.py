"""Every policy, family, way to generate and kernel once with the shapes of all functions checked.

The checks take most of the time of models this small, so the package is instrumented only where somebody asks for it:
`make test` runs what is marked `shapes` in a process of its own, `make test-all` everything.
"""

from __future__ import annotations

from dataclasses import replace

import jaxtyping
import pytest
import torch

import headwise
import models
import tiny
from every_policy import EVERY
from headwise.kernels.interface import AttentionMap
from headwise.policies.tokens import Tokens
from headwise.quant import codes
from headwise.store.rows import Rows
from headwise.types import LogitOptions
from less_oracle import kernels_of, networks_of
from matrix_policies import policy_of

pytestmark = pytest.mark.shapes

TOKENIZER = tiny.tokenizer()


def zeros(*shape):
    return torch.zeros(shape)


def counts(*shape):
    return torch.zeros(shape, dtype=torch.long)


@pytest.mark.parametrize(
    "call",
    [
        # A batch of its own, a dimension of its own, numbers for bits, an axis too many, a result that is none.
        lambda: Rows.of(zeros(1, 2, 3, 4), zeros(2, 2, 3, 4), counts(1, 2, 3), None, counts(1, 2, 3).bool()),
        lambda: AttentionMap(zeros(1, 2, 1, 3, 4), zeros(1, 2, 3, 5), None, LogitOptions(1.0)),
        lambda: Tokens(*[counts(1, 2, 3)] * 4, counts(1, 1, 1), counts(1, 1, 1), None, None, 0),
        lambda: codes.decode(zeros(3, 4).byte(), zeros(2, 2), 8),
        lambda: codes.encode(zeros(3, 4), 8.0, 4),
    ],
    ids=["batch", "dimension", "dtype", "rows", "argument"],
)
def test_a_wrong_shape_is_found(call, pytestconfig):
    """Otherwise nothing of the following says anything."""
    if not pytestconfig.getoption("--jaxtyping-packages"):
        pytest.skip("shapes are not checked in this run")
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def some_steps(policy, kernel, model=None, columns=29):
    """A padded batch, a few tokens one by one, then several at once; page and eviction borders are crossed."""
    model = model or tiny.llama(layers=2)
    ids, mask = tiny.left_padded(tiny.prompt(columns, seed=1)[0], tiny.prompt(columns // 2, seed=2)[0])
    cache = headwise.HeadwiseCache(model, policy, tokenizer=TOKENIZER, kernel=kernel, evict_every=2, page_size=4)
    with torch.no_grad():
        for new in (1, 1, 1, 3, 1, 0):
            at = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits = model(input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache).logits
            ids = tiny.prompt(new, seed=8, batch=2)
            mask = torch.cat([mask, torch.ones(2, new, dtype=torch.long)], 1)
    assert logits.isfinite().all()
    assert all(layer.core.store.lengths.max() > 0 for layer in cache.headwise_layers)
    return cache


@pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
def test_every_policy(policy):
    some_steps(policy, "cpu")


@pytest.mark.parametrize(
    "policy",
    [each for each in EVERY if each.again is not None],
    ids=lambda policy: policy.name,
)
def test_every_policy_that_chooses_again(policy):
    cache = some_steps(replace(policy, choose_every=3), "cpu")
    assert cache.headwise_layers[0].core.evicted_at == cache.get_seq_length() - 1


@pytest.mark.parametrize("kernel", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(
    "policy",
    [
        headwise.FastGen(0.6),
        headwise.PeakAttention(keep=0.5),
        headwise.Quantized(headwise.H2O(heavy=4, recent=5), 8),
        headwise.Quantized(headwise.Full(), 4),
        headwise.Auto(ratio=0.4),
    ],
    ids=["mass", "peaks", "8-bit", "4-bit", "several-formats"],
)
def test_every_kernel(policy, kernel):
    columns = 29 if kernel != "triton" else 13
    some_steps(policy, kernel, tiny.llama(layers=1, head_dim=8), columns)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_what_is_evicted_and_remembered(kernel):
    model = tiny.llama(layers=2)
    policy = headwise.Less(headwise.H2O(heavy=4, recent=5), kernels_of(model, networks_of(model)))
    cache = some_steps(policy, kernel, model)
    assert cache.report().memory_bytes > 0


@pytest.mark.parametrize("family", models.COMPRESSIBLE)
def test_every_family(family):
    generate(family, "padded")


@pytest.mark.parametrize("mode", models.MODES)
def test_every_way_to_generate(mode):
    generate("llama", mode)


def generate(family, mode):
    model = models.shared(family)
    # The look-up prompt is found with stock attention, before headwise is attached.
    models.lookup_prompt(model)
    cache = models.WatchedCache(
        model,
        policy_of(family, "fastgen-exact"),
        tokenizer=TOKENIZER,
        prompt_tokens=models.PROMPT if mode == "chunked" else None,
    )
    models.MODES[mode](model, cache)
    assert cache.report().saved_bytes > 0
