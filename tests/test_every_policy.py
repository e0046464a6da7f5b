"""Properties of every registered policy, so that a new one is tested by existing; and what its bytes come to."""

from __future__ import annotations

import pytest
import torch

import headwise
import tiny
from every_policy import EVERY
from headwise.policies.sinks import Sinks
from headwise.policies.window import Window
from oracle import rows_of

STEPS = 40


def steps(model, policy, ids, mask, count=STEPS, evict_every=1):
    """The cache after the prompt and after every further token."""
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer(), evict_every=evict_every)
    further = tiny.prompt(count, seed=8, batch=len(ids))
    with torch.no_grad():
        for step in range(count + 1):
            if step:
                mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.long)], 1)
            new = ids if step == 0 else further[:, step - 1 : step]
            at = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            model(input_ids=new, attention_mask=mask, position_ids=at, past_key_values=cache)
            yield cache


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_what_is_evicted_never_returns_and_padding_never_enters(policy):
    ids, mask = tiny.left_padded(tiny.prompt(29, seed=1)[0], tiny.prompt(13, seed=2)[0])
    before = None
    for step, cache in enumerate(steps(tiny.llama(layers=2), policy, ids, mask)):
        kept = [rows_of(layer.core) for layer in cache.headwise_layers]
        newest = ids.shape[1] + step - 1
        for layer, sequences in enumerate(kept):
            for sequence, heads in enumerate(sequences):
                for head, columns in enumerate(heads):
                    assert all(mask[sequence, column] for column in columns if column < ids.shape[1])
                    assert not columns or max(columns) <= newest
                    if before is not None:
                        assert columns <= before[layer][sequence][head] | {newest}
        before = kept


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_a_sequence_keeps_in_a_batch_what_it_keeps_alone(policy):
    model = tiny.llama(layers=2)
    prompts = [tiny.prompt(29, seed=1)[0], tiny.prompt(13, seed=2)[0]]
    ids, mask = tiny.left_padded(*prompts)
    *_, together = steps(model, policy, ids, mask, 0)
    for row, prompt in enumerate(prompts):
        *_, alone = steps(model, policy, prompt[None], torch.ones(1, len(prompt), dtype=torch.long), 0)
        pads = len(ids[row]) - len(prompt)
        for one, both in zip(alone.headwise_layers, together.headwise_layers, strict=True):
            shifted = [{column + pads for column in head} for head in rows_of(one.core)[0]]
            assert shifted == rows_of(both.core)[row]
        for one, both in zip(alone.report().rules, together.report().rules, strict=True):
            assert one[0].tolist() == both[row].tolist()


@pytest.mark.parametrize("evict_every", [1, 16])
@pytest.mark.parametrize(
    "policy",
    [
        headwise.Full(),
        headwise.FastGen(0.4),
        headwise.FastGen(0.9),
        headwise.H2O(0.1, 0.1),
        headwise.StreamingLLM(window=0.2),
        headwise.Window(256),
        headwise.Random(keep=0.2),
        Window(0.2) | Sinks(8),
    ],
    ids=str,
)
def test_bytes_follow_the_kept_rows(policy, evict_every):
    """At 1,000 tokens and more: used within 3 % of the rows' keys and values, allocated at most 10 % above.

    With amortised eviction every head may besides have room for the rows until the next one.
    """
    model = tiny.llama(heads=3, kv_heads=3, head_dim=64, layers=2)
    model.config.max_position_embeddings = 2048
    row = 2 * 64 * 4
    mask = torch.ones(1, 1009, dtype=torch.long)
    for cache in steps(model, policy, tiny.prompt(1009), mask, evict_every=evict_every):
        report = cache.report()
        rows = sum(int(kept.sum()) for kept in report.kept_tokens)
        assert rows * row <= report.used_bytes <= 1.03 * rows * row
        room = 0 if evict_every == 1 else evict_every * 2 * 3 * (row + 8)
        assert report.used_bytes <= report.allocated_bytes <= 1.10 * report.used_bytes + room
        assert report.full_bytes == 2 * 3 * report.seen_tokens * row
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors()}
        assert report.allocated_bytes == sum(stored.values())
