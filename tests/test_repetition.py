"""A further prompt is repeated over what is left of everything before it: what is asked, by whom, and what is found."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import headwise
import tiny
from headwise.hosts.transformers import cache as cache_module
from headwise.hosts.transformers import repetition
from headwise.hosts.transformers.decoder import decoder_of
from headwise.kernels.backends import choose
from headwise.kernels.interface import AttentionMap
from headwise.stages.repetition import RowFacts, attend_repetition_over_rows
from headwise.store.rows import Rows
from headwise.types import LogitOptions
from rechoosing import EVERY, PROMPT, follow, new
from scored_prompts import model, words

POLICY = headwise.KVzip(keep=0.3, choose_every=EVERY)
BATCH, HEADS, GROUP, HELD, QUERIES, DIM, VALUE = 2, 2, 3, 29, 7, 8, 5
CHUNK = slice(20, 33)


def brute_force(query, keys, values, held, positions, padding, *, asked):
    """Output and peaks of one sequence and one KV head, a query at a time."""
    biases = getattr(held, "biases", None)
    output, peaks = torch.zeros(GROUP, QUERIES, VALUE), torch.zeros(HELD)
    rows = held.keep.nonzero().flatten().tolist()
    for group in range(GROUP):
        sink = math.exp(held.sinks[group]) if held.sinks is not None else 0.0
        for place in range(QUERIES):
            if padding[place]:
                continue
            weights, own = {}, [p for p in range(place + 1) if not padding[p]]
            for row in rows:
                logit = float(query[group, place] @ held.keys[row]) * held.scaling
                weights[row] = math.exp(logit + (0.0 if biases is None else float(biases[row])))
            for p in own:
                weights[-1 - p] = math.exp(float(query[group, place] @ keys[p]) * held.scaling)
            whole = sum(weights.values()) + sink
            output[group, place] = sum(held.values[row] * weights[row] / whole for row in rows)
            output[group, place] += sum(values[p] * weights[-1 - p] / whole for p in own)
            counted = {r: w for r, w in weights.items() if r < 0 or r in asked or positions[r] < 4}
            for row in asked:
                peaks[row] = max(float(peaks[row]), counted[row] / (sum(counted.values()) + sink))
    return output, peaks


@pytest.mark.shapes
@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("extra", ["", "biases", "sinks", "padding"])
def test_what_rows_of_a_store_get(kernel, extra):
    draw = torch.Generator().manual_seed(3)

    def some(*shape):
        return torch.randn(*shape, generator=draw)

    columns = torch.stack([torch.randperm(40, generator=draw)[:HELD] for _ in range(BATCH * HEADS)]).view(
        BATCH, HEADS, -1
    )
    keep = torch.rand(BATCH, HEADS, HELD, generator=draw) < 0.8
    biases = some(BATCH, HEADS, HELD) if extra == "biases" else None
    held = Rows.of(some(BATCH, HEADS, HELD, DIM), some(BATCH, HEADS, HELD, VALUE), columns, None, keep)
    if biases is not None:
        held = held.replacing(biases=biases)
    query, keys = some(BATCH, HEADS, GROUP, QUERIES, DIM), some(BATCH, HEADS, QUERIES, DIM)
    values = some(BATCH, HEADS, QUERIES, VALUE)
    options = LogitOptions(0.3, sinks=some(HEADS, GROUP) if extra == "sinks" else None)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    mask = None
    if extra == "padding":
        padding[1, 2:4] = True
        mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril() & ~padding[:, None]
    kernels = choose(kernel, torch.device("cpu"))
    map = AttentionMap(query, keys, mask, options)
    output, found = attend_repetition_over_rows(map, values, held, RowFacts(columns), CHUNK, kernels)
    for b in range(BATCH):
        for h in range(HEADS):
            own = SimpleNamespace(**{name: part[b, h] for name, part in held.parts.items()}, keep=keep[b, h])
            asked = [r for r in range(HELD) if keep[b, h, r] and CHUNK.start <= columns[b, h, r] < CHUNK.stop]
            own.scaling, own.sinks = 0.3, None if options.sinks is None else options.sinks[h]
            asking = query[b, h], keys[b, h], values[b, h]
            expected = brute_force(*asking, own, columns[b, h], padding[b], asked=asked)
            seeing = ~padding[b]
            torch.testing.assert_close(output[b, h][:, seeing], expected[0][:, seeing], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[b, h], expected[1], atol=1e-5, rtol=1e-5)


def test_what_the_model_is_asked_to_repeat(monkeypatch):
    """The further prompt, in chunks, behind all that was seen; and nothing of it stays."""
    monkeypatch.setattr(repetition, "_CHUNK", 12)
    ids, asked = words(80, seed=8), []
    cache = follow(new(POLICY), ids, [1, 1])

    def watch(_, arguments, options):
        asked.append((options["input_ids"], options.get("position_ids")))

    hook = decoder_of(model()).register_forward_pre_hook(watch, with_kwargs=True)
    seen = PROMPT + 2
    with torch.no_grad():
        model()(input_ids=ids[:, seen : seen + 19], past_key_values=cache)
    hook.remove()
    tokenizer, turn = tiny.tokenizer(), ids[0, seen : seen + 19].tolist()

    def request(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    opening = repetition._answer_opening(tokenizer)
    expected = [
        request("\n\nRepeat the last part of the previous context exactly.") + opening + turn[:12],
        request("\n\nRepeat the part of the previous context exactly, starting with")
        + turn[4:12]
        + opening
        + turn[12:],
    ]
    (_, *repeated) = asked
    assert [each.tolist() for each, _ in repeated] == [[part] for part in expected]
    for (_, positions), part in zip(repeated, expected, strict=True):
        assert positions.tolist() == [list(range(seen + 19, seen + 19 + len(part)))]
    assert cache.get_seq_length() == seen + 19


@pytest.fixture
def calls(monkeypatch):
    """Of repetitions, which do not take place: how many tokens, from which column on."""
    found = []
    monkeypatch.setattr(cache_module, "repeat_prompt", lambda *given: found.append((given[5].shape[1], given[6])))
    for name in ("score", "remember"):
        monkeypatch.setattr(headwise.KVzip, name, lambda self, evidence: torch.zeros_like(evidence.keys[..., 0]))
    return found


def test_passes_are_repeated_that_bring_as_many_tokens_as_are_between_two_choices(calls):
    follow(new(POLICY), words(120, seed=9), [1, EVERY - 1, EVERY, 1, EVERY + 8])
    assert calls == [(PROMPT, 0), (EVERY, PROMPT + EVERY), (EVERY + 8, PROMPT + 2 * EVERY + 1)]


def test_drafts_are_not_repeated(calls):
    ids = words(120, seed=9)
    cache = follow(new(POLICY), ids, [])
    for layer in cache.headwise_layers:
        layer.activate_past_recording()
    with torch.no_grad():
        model()(input_ids=ids[:, PROMPT : PROMPT + EVERY], past_key_values=cache)
        cache.crop(0)
        model()(input_ids=ids[:, PROMPT + EVERY : PROMPT + EVERY + 1], past_key_values=cache)
    assert calls == [(PROMPT, 0)]


def test_a_pass_that_was_refused_is_not_repeated(calls):
    ids, mask, cache = words(60, seed=9), torch.ones(1, 60, dtype=torch.long), new(POLICY)
    mask[:, 0] = 0
    with torch.no_grad():
        for part in (slice(PROMPT), slice(PROMPT, PROMPT + 1)):
            model()(input_ids=ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache)
        with pytest.raises(headwise.InputError, match="was hidden when it was read"):
            model()(input_ids=ids[:, PROMPT + 1 : PROMPT + 1 + EVERY], past_key_values=cache)
        part = slice(PROMPT + 1, PROMPT + 2)
        model()(input_ids=ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache)
    assert calls == [(PROMPT, 0)]


def test_without_ids_a_further_prompt_begins_with_nothing():
    """As a further prompt in embeddings, which there is no repeating."""
    ids = words(70, seed=10)
    cache = follow(new(POLICY), ids, [])
    with torch.no_grad():
        embedded = model().get_input_embeddings()(ids[:, PROMPT : PROMPT + 9])
        model()(inputs_embeds=embedded, past_key_values=cache)
    assert cache.get_seq_length() == PROMPT + 9
