"""Attention over pages of single heads, by vLLM's kernel: several queries, learned sinks, a soft cap, 16 bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from headwise.hosts.vllm import micro_pages
from headwise.hosts.vllm.backend import HeadwiseImpl
from headwise.hosts.vllm.choice import PromptBlocks
from headwise.hosts.vllm.options import Options
from headwise.hosts.vllm.prompts import Prompt
from headwise.hosts.vllm.step import batch_of

HEADS, GROUP, DIM, SIZE, BLOCKS, LAYERS = 3, 2, 32, 32, 40, 2
SCALE = 0.3


def written(dtype):
    """A cache with random rows, by vLLM's own kernel, and those rows by block and place."""
    torch.manual_seed(2)
    cache = torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM, dtype=dtype)
    keys, values = torch.randn(2, BLOCKS * SIZE, HEADS, DIM).to(dtype)
    blocks = torch.arange(BLOCKS)
    for head in range(HEADS):
        pages = blocks * HEADS + head
        micro_pages.write_rows(cache, pages, keys[:, head], values[:, head], _get_attn_isa(dtype, SIZE, DIM))
    return cache, keys.unflatten(0, (BLOCKS, SIZE)), values.unflatten(0, (BLOCKS, SIZE))


def test_what_is_written_is_read():
    cache, keys, values = written(torch.float32)
    blocks = torch.tensor([7, 3, 11])
    found = micro_pages.read_blocks(cache, blocks)
    for own, rows in zip(found, (keys, values), strict=True):
        assert torch.equal(own, rows[blocks].flatten(0, 1).transpose(0, 1))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [(1, 1), (1, 5), (3, 2)])
def test_every_head_sees_its_own_pages(queries, softcap, sinks, dtype, near, monkeypatch):
    cache, keys, values = written(dtype)
    isa = _get_attn_isa(dtype, SIZE, DIM)
    logit_of_sink = torch.randn(HEADS * GROUP) if sinks else None
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    # Not asked for by all releases.
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config, raising=False)
    impl = HeadwiseImpl(HEADS * GROUP, DIM, SCALE, HEADS, None, None, "auto", softcap, sinks=logit_of_sink)
    prompts, ids, lengths, places, tokens = [], [], [], [], []
    for number, (prompt_tokens, later) in enumerate(((5 * SIZE + 9, 40), (8 * SIZE, 7))):
        blocks = PromptBlocks.of(Options(ratio=0.5), prompt_tokens, SIZE)
        prompt = Prompt(Options(ratio=0.5), blocks, LAYERS, HEADS)
        own = torch.randperm(BLOCKS // 2)[: -(-(prompt_tokens + later) // SIZE)] + number * (BLOCKS // 2)
        stay = blocks.stay * HEADS
        for layer in range(LAYERS):
            counts = [[1, 2, stay - 3], [stay - 5, 4, 1]][layer]
            prompt.place(layer, own[: blocks.stay], [torch.arange(count * SIZE) for count in counts])
        prompts.append(prompt)
        ids.append(own)
        lengths.append(prompt_tokens + later)
        places.append(sum(queries[:number]))
        tokens.append(slice(places[-1], places[-1] + queries[number]))
    batch = batch_of(prompts, ids, lengths, tokens)
    query = torch.randn(sum(queries), HEADS * GROUP, DIM).to(dtype)
    for layer in range(LAYERS):
        found = impl._attend(SimpleNamespace(isa=isa), layer, query, cache, batch)
        for number, prompt in enumerate(prompts):
            for head in range(HEADS):
                pages = [
                    (int(p) // HEADS, int(p) % HEADS) for p in prompt.pages[layer, head, : prompt.counts[layer, head]]
                ]
                pages += [(int(b), head) for b in ids[number][prompt.blocks.whole :]]
                seen = len(pages) * SIZE
                extent = int(prompt.counts[layer, head]) * SIZE + lengths[number] - prompt.blocks.candidates
                rows_k, rows_v = (
                    torch.cat([rows[b, :, h] for b, h in pages])[:extent].float() for rows in (keys, values)
                )
                assert extent <= seen
                for i, at in enumerate(range(tokens[number].start, tokens[number].stop)):
                    visible = extent - queries[number] + i + 1
                    for g in range(GROUP):
                        logits = query[at, head * GROUP + g].float() @ rows_k[:visible].T * SCALE
                        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                        if logit_of_sink is not None:
                            logits = torch.cat([logits, logit_of_sink[head * GROUP + g : head * GROUP + g + 1]])
                        weights = logits.softmax(dim=0)[:visible]
                        torch.testing.assert_close(
                            found[at, head * GROUP + g].float(), weights @ rows_v[:visible], atol=near, rtol=near
                        )


def test_an_unknown_layout_is_refused(monkeypatch):
    import headwise

    micro_pages.check_layout(HEADS, SIZE, DIM, torch.float32, _get_attn_isa(torch.float32, SIZE, DIM))
    micro_pages.check_layout.cache_clear()
    write = micro_pages.ops.cpu_attn_reshape_and_cache
    monkeypatch.setattr(
        micro_pages.ops, "cpu_attn_reshape_and_cache", lambda keys, values, *given: write(keys.flip(2), values, *given)
    )
    with pytest.raises(headwise.UnsupportedModelError, match="is not known"):
        micro_pages.check_layout(HEADS, SIZE, DIM, torch.float32, _get_attn_isa(torch.float32, SIZE, DIM))
    micro_pages.check_layout.cache_clear()
