"""A cache that decodes for long: what it holds does not grow, neither rows nor tables nor what it knows of tokens."""

from __future__ import annotations

import pytest
import torch

import headwise
import tiny
from headwise.units import storage_bytes

MODEL = tiny.llama(layers=1, heads=2, kv_heads=2)
POLICIES = [
    headwise.StreamingLLM(window=28, sinks=4),
    headwise.H2O(heavy=16, recent=16),
    headwise.Quantized(headwise.StreamingLLM(window=60, sinks=4), 8, recent=20),
    headwise.SnapKV(keep=32, window=8),
    headwise.AdaKV(keep=32, over=headwise.TOVA(32), choose_every=24),
    headwise.KVzip(keep=32),
    headwise.Auto(bytes=20_000, window=8),
]


def plain_sizes(held, depth=0):
    """Lengths of all lists, dicts and tuples, and elements of all tensors, that an object has by whatever way."""
    if isinstance(held, torch.Tensor):
        return held.numel()
    if isinstance(held, dict):
        return len(held) + sum(plain_sizes(each, depth + 1) for each in held.values())
    if isinstance(held, list | tuple | set):
        return len(held) + sum(plain_sizes(each, depth + 1) for each in held)
    if type(held).__module__.startswith("headwise.") and hasattr(held, "__dict__") and depth < 12:
        return sum(plain_sizes(each, depth + 1) for name, each in vars(held).items() if name not in ("config", "rungs"))
    return 0


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_is_held_is_the_same_after_2000_and_4000_tokens(policy):
    cache = headwise.HeadwiseCache(MODEL, policy, tokenizer=tiny.tokenizer(), evict_every=16)
    held = []
    with torch.no_grad():
        for count in (40, 1):
            MODEL(tiny.prompt(count), past_key_values=cache)
        # Sixty tokens to a pass and now and then single ones, so that both ways of eviction are taken.
        while cache.get_seq_length() < 4000:
            for count in (60,) * 2 + (1,) * 4:
                MODEL(tiny.prompt(count), past_key_values=cache)
            seen = cache.get_seq_length()
            core = cache.headwise_layers[0].core
            table = core.store.exact.pages
            held.append(
                (
                    seen,
                    storage_bytes(cache.tensors()),
                    table.entries.numel(),
                    table.capacity,
                    len(table._free),
                    plain_sizes(core) + plain_sizes(cache.token_log),
                )
            )
    late = [sizes[1:] for sizes in held if sizes[0] >= 2000]
    assert len(late) > 6
    # It breathes with evictions; the second half of the time takes no more than the first.
    half = len(late) // 2
    for early, later in zip(zip(*late[:half], strict=True), zip(*late[half : 2 * half], strict=True), strict=True):
        # Where heads compete for rows, one may be a page longer now and then, and their table is that much wider.
        assert max(later) <= 1.001 * max(early) + 2
