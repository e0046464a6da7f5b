"""Passes that do not go with what a cache has seen: refused before anything changes, by an error that says why."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import headwise
import tiny
from headwise.errors import HeadwiseWarning, InputError

POLICIES = [headwise.Full(), headwise.H2O(heavy=6, recent=6), headwise.SnapKV(keep=0.5)]


def passed(model, cache, ids, mask=None, **options):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache, **options).logits


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("after", [1, 3])
def test_another_number_of_sequences_is_refused_and_changes_nothing(policy, after, kernel):
    model = tiny.llama()
    one, other = (headwise.HeadwiseCache(model, policy, kernel=kernel) for _ in range(2))
    for cache in (one, other):
        passed(model, cache, tiny.prompt(20, batch=2))
    with pytest.raises(InputError, match=f"holds 2 sequences and this pass brings {after}; .*batch_select_indices"):
        passed(model, one, tiny.prompt(1, batch=after))
    one.layers[0].awaits_attention = False
    again = [passed(model, cache, tiny.prompt(1, batch=2, seed=4)) for cache in (one, other)]
    assert torch.equal(*again)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_was_hidden_cannot_be_shown_later(policy):
    model, ids = tiny.llama(), tiny.prompt(20, batch=2)
    hidden = torch.ones_like(ids)
    hidden[1, 5:9] = 0
    shown = torch.ones(2, 21, dtype=torch.long)
    cache = headwise.HeadwiseCache(model, policy)
    passed(model, cache, ids, hidden)
    with pytest.raises(
        InputError, match="column 5 of sequence 1 was hidden when it was read, and the mask of this pass shows it"
    ):
        passed(model, cache, ids[:, :1], torch.where(torch.arange(21) < 8, shown, 1) * (torch.arange(21) != 7))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_padding_needs_its_mask_in_every_pass(policy):
    model = tiny.llama()
    ids, mask = tiny.left_padded(tiny.prompt(13)[0], tiny.prompt(20)[0])
    cache = headwise.HeadwiseCache(model, policy)
    passed(model, cache, ids, mask)
    with pytest.raises(InputError, match=r"7 columns of the prompt were hidden \(padding\), and this pass has no mask"):
        passed(model, cache, ids[:, :1])


def test_what_was_shown_may_be_hidden_and_shown_again():
    """As with the stock cache: it is still there."""
    model, ids = tiny.llama(), tiny.prompt(20)
    cache, stock = headwise.HeadwiseCache(model, headwise.Full()), DynamicCache(config=model.config)
    masks = [torch.ones(1, 20), torch.ones(1, 21), torch.ones(1, 22), torch.ones(1, 23)]
    masks[1][:, 3:8] = masks[2][:, 6:11] = 0
    for mask, new in zip(masks, [ids, ids[:, :1], ids[:, 4:5], ids[:, 7:8]], strict=True):
        at = torch.arange(mask.shape[1] - new.shape[1], mask.shape[1])[None]
        mine, its = (passed(model, one, new, mask.long(), position_ids=at) for one in (cache, stock))
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("policy", [headwise.Full(), headwise.H2O(heavy=9, recent=9)], ids=str)
def test_what_half_precision_cannot_hold_is_clamped_and_said(policy, kernel):
    model = tiny.llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(3e5)
            layer.self_attn.o_proj.weight.div_(3e5)
    cache = headwise.HeadwiseCache(model, policy, cache_dtype=torch.float16, kernel=kernel)
    with pytest.warns(HeadwiseWarning, match="numbers of values are beyond 65,504, the largest that torch.float16"):
        passed(model, cache, tiny.prompt(30))
    with pytest.warns(HeadwiseWarning, match="numbers of values are beyond"):
        assert passed(model, cache, tiny.prompt(1)).isfinite().all()
    held = cache.headwise_layers[0].core.store.rows()
    assert held.values[held.keep].abs().max() == 65504


def test_codes_say_it_too():
    """Of rows that come later; a prompt's heads that codes do not suit stay exact."""
    model = tiny.llama()
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.Full(), 8, recent=2, sinks=1))
    passed(model, cache, tiny.prompt(30))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e6)
    with pytest.warns(HeadwiseWarning, match="rows that become codes are beyond 65,504"):
        passed(model, cache, tiny.prompt(30, seed=1))


def test_what_is_infinite_stays_in_the_sequence_that_has_it():
    model, ids = tiny.llama(), tiny.prompt(30, batch=2)
    embeddings = model.get_input_embeddings()(ids).detach()
    embeddings[1, 7] = torch.inf
    cache = headwise.HeadwiseCache(model, headwise.Full(), cache_dtype=torch.float16)
    clean = headwise.HeadwiseCache(model, headwise.Full(), cache_dtype=torch.float16)
    with torch.no_grad():
        model(inputs_embeds=embeddings, past_key_values=cache)
        model(input_ids=ids, past_key_values=clean)
    mine, its = (passed(model, one, ids[:, :1]) for one in (cache, clean))
    torch.testing.assert_close(mine[0], its[0])
    assert mine[1].isnan().all()
