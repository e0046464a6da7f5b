"""One layer with LESS, alone and of any shape, pass by pass against the definition."""

from __future__ import annotations

import pytest
import torch

import headwise
from cases import EVERYTHING, pairwise
from headwise.kernels.attention import dense_attention
from headwise.kernels.backends import choose
from headwise.kernels.interface import AttentionMap
from headwise.less.features import LayerFeatures
from headwise.stages.config import CacheConfig, LayerConfig
from headwise.stages.layer import LayerCache
from headwise.stages.token_log import TokenLog
from headwise.types import LogitOptions
from less_caches import SCORED, SMALL
from less_oracle import StateChecker, draw

REFERENCE = choose("reference", torch.device("cpu"))


def layer(policy, networks, *, kernels=REFERENCE, evict_every=1, page_size=4, prompt_columns=None):
    config = CacheConfig(kernels, page_size, prompt_columns, evict_every)
    return LayerCache(LayerConfig(0, policy, config, features=networks), TokenLog("kind" in policy.facts))


def stream(core, query, keys, values, lengths, options, seen=None):
    """The outputs of every pass, as columns are given in passes of those lengths."""
    outputs, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        outputs.append(core.attend(query[:, :, :, rows], keys[:, :, rows], values[:, :, rows], None, options))
        start += length
        if seen is not None:
            seen(core)
    return torch.cat(outputs, dim=3)


def random_rows(b=2, h=2, g=3, t=50, d=16, e=16):
    return torch.randn(b, h, g, t, d), torch.randn(b, h, t, d), torch.randn(b, h, t, e)


@pairwise(
    indirect=["kernels"],
    shape=[(3, 1, 16, "plain"), (2, 3, 16, "sinks"), (1, 6, 16, "softcap"), (2, 2, 7, "plain")],
    policy=[SMALL, SCORED],
    prompt=[1, 6, 9, 20],
    kernels=["reference", "cpu"],
)
def test_every_step_of_a_layer_agrees_with_the_definition(policy, prompt, shape, kernels):
    heads, group, value_dim, kind = shape
    networks = draw(heads, group, 16)
    core = layer(policy, networks.folded(), kernels=kernels)
    checker = StateChecker(core, networks, tolerance=1e-5)
    options = LogitOptions(
        0.25, 3.0 if kind == "softcap" else None, torch.randn(heads, group) if kind == "sinks" else None
    )
    rows = random_rows(h=heads, g=group, t=prompt + 30, e=value_dim)
    stream(core, *rows, [prompt, *[1] * 30], options, lambda _: checker.check_state())
    assert checker.effect > 0.02


@pytest.mark.parametrize("evict_every", [1, 16])
@pytest.mark.parametrize("policy", [SMALL, SCORED], ids=lambda policy: policy.name)
def test_padding_of_a_later_turn_is_not_folded_in(policy, evict_every):
    networks = draw(2, 3, 16)
    core = layer(policy, networks.folded(), evict_every=evict_every)
    checker = StateChecker(core, networks)
    query, keys, values = random_rows(t=45)
    real = torch.ones(2, 45, dtype=torch.bool)
    real[1, 17:24] = False
    mask = torch.ones(45, 45, dtype=torch.bool).tril() & real[:, None]
    for start, end in ((0, 12), (12, 24), (24, 25), (25, 45)):
        rows = slice(start, end)
        given = query[:, :, :, rows], keys[:, :, rows], values[:, :, rows], mask[:, rows, :end]
        core.attend(*given, LogitOptions(0.25))
        checker.check_state()
    assert checker.effect > 0.02


@pytest.mark.parametrize(
    "policy", [headwise.H2O(4, 5), headwise.H2O(0, 5), headwise.H2O(4, 0), headwise.Window(6)], ids=str
)
def test_a_head_holds_its_budget_and_a_state_of_constant_size(policy):
    networks = draw(2, 3, 16)
    core = layer(policy, networks.folded())
    budget = policy.heavy + policy.recent if isinstance(policy, headwise.H2O) else policy.size
    sizes = set()

    def look(core):
        if core.store is not None and core.seen > budget:
            assert core.store.lengths.unique().tolist() == [budget]
            sizes.add(core.evicted_bytes)
            assert core.used_bytes == core.store.used_bytes + core.evicted_bytes

    stream(core, *random_rows(t=40), [6, *[1] * 10, 4, *[1] * 20], LogitOptions(0.25), look)
    # Two sequences, two KV heads, 4 features of 16 numbers and one more, 4 bytes each.
    assert sizes == {2 * 2 * 4 * 17 * 4}


@pytest.mark.parametrize("policy", [SMALL, SCORED, headwise.Random(keep=3)], ids=str)
def test_within_the_budget_attention_is_full_and_nothing_is_remembered(policy):
    query, keys, values = random_rows(t=3)
    core, options = layer(policy, draw(2, 3, 16).folded()), LogitOptions(0.25)
    found = stream(core, query, keys, values, [1, 1, 1], options)
    torch.testing.assert_close(
        found, dense_attention(AttentionMap(query, keys, None, options), values), atol=1e-6, rtol=0
    )
    assert core.evicted.state() == {}
    assert core.evicted_bytes == 0


class Exact(LayerFeatures):
    """Features that make the state exact: one for every column, whose weight is the exponential of its logit."""

    def of_queries(self, query):
        return (query @ self.query_in).exp()

    def of_keys(self, keys):
        nearest = torch.cdist(keys, self.key_in.transpose(-1, -2)).argmin(-1)
        return torch.nn.functional.one_hot(nearest, self.count).float()

    def to(self, device):
        return self


# Twelve meet every policy with every interval.
@pytest.mark.parametrize("seed", range(50 if EVERYTHING else 12))
def test_with_exact_features_the_output_is_full_attention(seed):
    torch.manual_seed(seed)
    query, keys, values = random_rows(b=1, t=40, d=8, e=8)
    options = LogitOptions(0.3)
    columns = keys[0].transpose(-1, -2)
    kernels = Exact(
        (columns * 0.3)[:, None].expand(-1, 3, -1, -1),
        torch.zeros(2, 3, 40, 40),
        columns,
        torch.zeros(2, 40, 40),
        torch.eye(40).expand(2, -1, -1),
    )
    policy = [headwise.Random(keep=5, seed=seed), SMALL, SCORED, headwise.Window(1)][seed % 4]
    core = layer(policy, kernels, evict_every=1 + seed % 3)
    found = stream(core, query, keys, values, [1 + seed % 20, *[1] * (39 - seed % 20)], options)
    torch.testing.assert_close(
        found, dense_attention(AttentionMap(query, keys, None, options), values), atol=1e-5, rtol=0
    )
    assert core.store.lengths.max() < 12


def test_grouped_queries_share_the_state_of_their_kv_head():
    """As without groups, with keys, values and key networks repeated for every query head."""
    networks = draw(2, 3, 16).folded()
    alone = LayerFeatures(
        networks.query_in.flatten(0, 1)[:, None],
        networks.query_out.flatten(0, 1)[:, None],
        *(t.repeat_interleave(3, 0) for t in (networks.key_in, networks.key_out, networks.key_mix)),
    )
    query, keys, values = random_rows()
    lengths, options = [9, *[1] * 41], LogitOptions(0.25)
    grouped, single = layer(SMALL, networks), layer(SMALL, alone)
    found = stream(grouped, query, keys, values, lengths, options)
    repeated = keys.repeat_interleave(3, 1), values.repeat_interleave(3, 1)
    expected = stream(single, query.flatten(1, 2)[:, :, None], *repeated, lengths, options)
    torch.testing.assert_close(found.flatten(1, 2)[:, :, None], expected, atol=1e-5, rtol=0)
    assert grouped.evicted.sums.shape == (2, 2, 4, 16)
    torch.testing.assert_close(grouped.evicted.sums.repeat_interleave(3, 1), single.evicted.sums, atol=1e-5, rtol=1e-5)
