"""What training of LESS captures of a policy's evictions, and how it is stored."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from headwise import InputError, StreamingLLM
from headwise.less.state import EvictedState
from headwise.policies import H2O, FastGen, KVzip, SnapKV
from headwise.stages.layer import LayerCache
from headwise.training.less.capture import Captured
from headwise.training.less.one_layer import remembered
from headwise.training.less.run import capture
from headwise.training.less.samples import Samples, sample_bytes
from headwise.training.passages import draw_passages
from headwise.types import LogitOptions
from less_training import feed, random_captured, random_kernels, watched
from tiny import llama, prompt, tokenizer

# What is captured.


@pytest.mark.parametrize("policy", [StreamingLLM(window=9, sinks=2), H2O(heavy=5, recent=4), SnapKV(keep=7, window=3)])
def test_a_captured_layer_answers_as_the_memory_does_in_use(policy):
    """The whole path: capture, fold and merge in training are the cache with these kernels."""
    query, keys, values = torch.randn(1, 2, 3, 61, 14), torch.randn(1, 2, 61, 14), torch.randn(1, 2, 61, 14)
    kernels = random_kernels(2, 3, 14).folded()
    layer = watched(policy)
    full = feed(layer, query, keys, values, 30, 31)
    captured = layer.captured()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.flatten(1, 2), keys.repeat_interleave(3, 1), values.repeat_interleave(3, 1), is_causal=True
    ).view_as(full)
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(captured.target, expected[:, :, :, 30:])

    used = watched(policy, kind=LayerCache)
    used.evicted = EvictedState(kernels)
    used.reset()
    outputs = feed(used, query, keys, values, 30, 4)[:, :, :, 30:]
    torch.testing.assert_close(remembered(kernels, captured), outputs)
    assert not torch.allclose(captured.exact, outputs, atol=1e-3)


@pytest.mark.shapes
def test_every_evicted_row_is_captured_once_with_its_turn():
    query, keys, values = torch.randn(1, 2, 3, 50, 14), torch.randn(1, 2, 50, 14), torch.randn(1, 2, 50, 14)
    layer = watched(StreamingLLM(window=6, sinks=2))
    feed(layer, query, keys, values, 21, 29)
    captured = layer.captured()
    # After the prompt 2 + 6 of 21 rows are kept; later, every 4th token, 4 more go.
    assert captured.fold[0, 0].tolist() == [1] * 13 + [n for n in range(2, 9) for _ in range(4)]
    assert captured.stage[0].tolist() == [n for n in range(1, 9) for _ in range(4)][:29]
    gone = range(2, 2 + captured.fold.shape[-1])
    # Within one eviction rows come in any order, each key with its value.
    columns = torch.cdist(captured.keys, keys).argmin(dim=-1)
    assert columns.sort(dim=-1).values[0, 1].tolist() == list(gone)
    index = columns[..., None].expand_as(captured.keys)
    torch.testing.assert_close(captured.keys, keys.gather(2, index))
    torch.testing.assert_close(captured.values, values.gather(2, index))


def test_nothing_is_captured_where_nothing_goes_or_nothing_follows():
    query, keys, values = torch.randn(1, 2, 3, 20, 14), torch.randn(1, 2, 20, 14), torch.randn(1, 2, 20, 14)
    layer = watched(StreamingLLM(window=30, sinks=2))
    feed(layer, query, keys, values, 12, 8)
    assert layer.captured() is None
    layer = watched(StreamingLLM(window=3, sinks=2))
    layer.attend(query, keys, values, None, LogitOptions(1.0))
    assert layer.captured() is None


@pytest.mark.parametrize(
    "policy", [H2O(heavy=4, recent=4), FastGen(recovery=0.3), KVzip(keep=6)], ids=lambda policy: policy.name
)
def test_the_model_goes_on_as_with_a_full_cache(policy):
    model, ids = llama(), prompt(47)
    captured = capture(model, tokenizer(), policy, ids, 31)
    assert sorted(captured) == [0, 1, 2]
    asked = {}

    def watch(index):
        def hook(module, args, kwargs, output):
            asked[index] = output[0]

        return hook

    projected = {}
    handles = [
        layer.self_attn.register_forward_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for index, found in captured.items():
        if found is not None:
            heads = found.target.permute(0, 3, 1, 2, 4).flatten(2)
            projected[index] = heads @ model.model.layers[index].self_attn.o_proj.weight.T
            torch.testing.assert_close(projected[index], asked[index][:, 31:], atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()
    assert projected


def test_samples_come_back_in_any_order_padded_to_the_longest(tmp_path):
    made = [random_captured(5, n) for n in (7, 3, 11)]
    samples = Samples(tmp_path, 20, 30)
    for number, found in enumerate(made):
        samples.append({0: found, 1: None if number == 1 else found})
    again = Samples(tmp_path, 20, 30)
    assert (again.sequences, again.layers, again.of_layer(0), again.of_layer(1)) == (3, [0, 1], [0, 1, 2], [0, 2])
    batch = again.batch(0, [2, 1], torch.device("cpu"))
    for field in fields(Captured):
        rows = getattr(batch, field.name)
        torch.testing.assert_close(rows[:1], getattr(made[2], field.name))
    torch.testing.assert_close(batch.fold[1, :, :3], made[1].fold[0])
    assert batch.fold[1, :, 3:].eq(0).all()
    torch.testing.assert_close(again.batch(1, [2], torch.device("cpu")).keys, made[2].keys)
    kernels = random_kernels(2, 2, 6).folded()
    together = remembered(kernels, batch)
    torch.testing.assert_close(together[1:], remembered(kernels, made[1]))


def test_a_sequence_that_was_broken_off_is_overwritten(tmp_path, monkeypatch):
    made = [random_captured(5, n) for n in (7, 3)]
    samples = Samples(tmp_path, 20, 30)
    samples.append({0: made[0], 1: made[0]})
    broken = Samples(tmp_path, 20, 30)
    array, calls = broken._array, []

    def fails(layer, name, like=None):
        calls.append(layer)
        if layer == 1:
            raise KeyboardInterrupt
        return array(layer, name, like)

    monkeypatch.setattr(broken, "_array", fails)
    with pytest.raises(KeyboardInterrupt):
        broken.append({0: made[0], 1: made[0]})
    again = Samples(tmp_path, 20, 30)
    assert again.sequences == 1
    again.append({0: made[1], 1: made[1]})
    for layer in (0, 1):
        torch.testing.assert_close(again.batch(layer, [1], torch.device("cpu")).values, made[1].values)


def test_the_stated_size_is_what_the_files_take(tmp_path):
    samples = Samples(tmp_path, 40, 60)
    samples.append({3: random_captured(5, 7)})
    size = sum(path.stat().st_size for path in tmp_path.glob("003-*.npy"))
    headers = 128 * 8
    assert size - headers == sample_bytes(40, 60, heads=2, group=2, key_dim=6, value_dim=6)


def test_passages_are_drawn_apart_and_fit():
    lengths = [5000, 300, 9000]
    passages = draw_passages(lengths, 200, (64, 512), 40, seed=3)
    assert passages == draw_passages(lengths, 200, (64, 512), 40, seed=3)
    assert passages != draw_passages(lengths, 200, (64, 512), 40, seed=4)
    assert sum(p.checks for p in passages) == 20
    for p in passages:
        start, end = p.start, p.start + p.prompt + 40
        edge = round(lengths[p.text] * 0.9)
        assert (start >= edge and end <= lengths[p.text]) if p.checks else (start >= 0 and end <= edge)
        assert 64 <= p.prompt <= 512
    assert {p.text for p in passages if not p.checks} == {0, 1, 2}
    halves = [p.prompt < (64 * 512) ** 0.5 for p in passages if p.text != 1 and not p.checks]
    assert 0.35 < sum(halves) / len(halves) < 0.65
    with pytest.raises(InputError, match="too short"):
        draw_passages([500], 10, (64, 512), 40, seed=0)
    assert {p.prompt for p in draw_passages([9000], 50, (300, 300), 40, seed=0)} == {300}
