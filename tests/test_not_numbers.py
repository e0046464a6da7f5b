"""NaN and infinite numbers in one sequence of a batch: the others keep, answer and go on as if they were not there."""

from __future__ import annotations

import warnings

import pytest
import torch

import headwise
import tiny
from every_policy import EVERY
from oracle import rows_of

# Embedded as what is no number.
BAD = 90
# The sequence in whose midst it stands, and those beside it.
WITH, BESIDE = 1, [0, 2]
STEPS, AFTER = 20, 14
PROMPTS = [tiny.prompt(length, seed=seed)[0] for seed, length in enumerate((29, 21, 13), start=1)]
LATER = tiny.prompt(STEPS, seed=8, batch=3)
for _ids in (*PROMPTS, LATER):
    _ids[_ids == BAD] = BAD - 1

POLICIES = [
    *EVERY,
    headwise.FastGen(0.5),
    headwise.Quantized(headwise.Full(), 4, recent=4),
    headwise.Quantized(headwise.H2O(heavy=5, recent=6), 8, recent=2),
    headwise.Auto(ratio=0.4, window=8, recent=4),
    headwise.AdaKV(keep=0.3, over=headwise.ExpectedAttention(keep=0.3)),
]


def run(policy, number, where, **options):
    """Logits and kept columns of the sequences beside, after the prompt and after every token; two of three go on."""
    model = tiny.llama(layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = number
    ids, mask = tiny.left_padded(*PROMPTS)
    later, beside = LATER.clone(), BESIDE
    (ids if where == "prompt" else later)[WITH, 15 if where == "prompt" else 3] = BAD
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer(), evict_every=4, **options)
    logits, kept = [], []
    with torch.no_grad():
        for step in range(STEPS + 1):
            if step == AFTER:
                order = torch.tensor(BESIDE[::-1])
                cache.batch_select_indices(order)
                mask, later, beside = mask[order], later[order], [1, 0]
            new = ids if step == 0 else later[:, step - 1 : step]
            if step:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            at = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            out = model(input_ids=new, attention_mask=mask, position_ids=at, past_key_values=cache).logits[:, -1]
            logits.append(out[beside])
            kept.append([[rows_of(layer.core)[row] for row in beside] for layer in cache.headwise_layers])
            if step == AFTER - 1:
                cache.report().to_dict()
            if step == (0 if where == "prompt" else 4):
                # Later it may have been evicted.
                assert bool(out[WITH].isfinite().all()) == (number == 0)
    return torch.stack(logits), kept


@pytest.mark.parametrize("where", ["prompt", "later"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_they_stay_in_the_sequence_that_has_them(policy, where):
    logits, kept = run(policy, 0.0, where)
    # An infinite number becomes none in the first norm.
    with warnings.catch_warnings():
        warnings.simplefilter("error", headwise.HeadwiseWarning)
        found, held = run(policy, float("nan"), where)
    assert found.isfinite().all()
    assert held == kept
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"kernel": "reference"}, {"cache_dtype": torch.float16}], ids=str)
@pytest.mark.parametrize("policy", [headwise.FastGen(0.5), headwise.Quantized(headwise.SnapKV(keep=0.3), 4)], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_whatever_kernels_read_them_and_whichever_they_are(policy, number, options):
    logits, kept = run(policy, 0.0, "prompt", **options)
    found, held = run(policy, number, "prompt", **options)
    assert held == kept
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
