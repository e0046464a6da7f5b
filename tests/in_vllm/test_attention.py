"""Attention over pages of single heads, by vLLM's kernel: several queries, learned sinks, a soft cap, 16 bits."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from flash_kernels import paged_attention
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

import headwise
from headwise.hosts.vllm import cpu_pages as cpu_layout
from headwise.hosts.vllm.choice import PromptBlocks
from headwise.hosts.vllm.cpu import HeadwiseImpl
from headwise.hosts.vllm.cpu_pages import CpuPages
from headwise.hosts.vllm.flash_pages import FlashPages, check_kernel
from headwise.hosts.vllm.options import Options
from headwise.hosts.vllm.prompts import Prompt
from headwise.hosts.vllm.step import batch_of

HEADS, GROUP, DIM, SIZE, BLOCKS, LAYERS = 3, 2, 32, 32, 40, 2
SCALE = 0.3


def cpu_pages(dtype, impl):
    isa = _get_attn_isa(dtype, SIZE, DIM)
    return CpuPages(torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM, dtype=dtype), isa, impl)


def flash_pages(layout, dtype, impl):
    """A cache as vLLM has it on GPUs: heads inside blocks or blocks inside heads, alone or with other layers' rows."""
    if layout == "keys and values apart":
        cache = torch.zeros(2, BLOCKS, SIZE, HEADS, DIM, dtype=dtype)
    elif layout == "heads inside":
        cache = torch.zeros(BLOCKS, SIZE, HEADS, 2 * DIM, dtype=dtype).transpose(1, 2)
    elif layout == "blocks inside heads":
        cache = torch.zeros(HEADS, BLOCKS, SIZE, 2 * DIM, dtype=dtype).transpose(0, 1)
    elif layout == "heads outside":
        cache = torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM, dtype=dtype)
    else:
        cache = torch.full((BLOCKS, 3, SIZE, HEADS, 2 * DIM), torch.nan, dtype=dtype)[:, 1].transpose(1, 2)
        cache.zero_()
    kernel = partial(paged_attention, softmax_scale=SCALE, softcap=impl.logits_soft_cap)
    return FlashPages.of_cache(cache, DIM, kernel)


PAGES = {"cpu": cpu_pages}
for layout in ("keys and values apart", "heads inside", "heads outside", "blocks inside heads", "layers inside"):
    PAGES[layout] = partial(flash_pages, layout)


def made(kind, dtype, softcap=None, sinks=None):
    """Pages with random rows, those rows by block and place, and what attends."""
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    with pytest.MonkeyPatch.context() as patch:
        # Not asked for by all releases.
        patch.setattr(cpu_attn, "get_current_vllm_config", lambda: config, raising=False)
        impl = HeadwiseImpl(HEADS * GROUP, DIM, SCALE, HEADS, None, None, "auto", softcap, sinks=sinks)
    torch.manual_seed(2)
    pages = PAGES[kind](dtype, impl)
    keys, values = torch.randn(2, BLOCKS * SIZE, HEADS, DIM).to(dtype)
    blocks = torch.arange(BLOCKS)
    for head in range(HEADS):
        pages.write(blocks * HEADS + head, keys[:, head], values[:, head])
    return pages, keys.unflatten(0, (BLOCKS, SIZE)), values.unflatten(0, (BLOCKS, SIZE)), impl


@pytest.mark.parametrize("kind", PAGES)
def test_what_is_written_is_read(kind):
    pages, keys, values, _ = made(kind, torch.float32)
    blocks = torch.tensor([7, 3, 11])
    for own, rows in zip(pages.read(blocks), (keys, values), strict=True):
        assert torch.equal(own, rows[blocks].flatten(0, 1).transpose(0, 1))
    # One page of one head is written, and nothing else.
    pages.write(torch.tensor([3 * HEADS + 1]), torch.ones(SIZE, DIM), torch.full((SIZE, DIM), 2.0))
    keys[3, :, 1], values[3, :, 1] = 1, 2
    for own, rows in zip(pages.read(torch.arange(BLOCKS)), (keys, values), strict=True):
        assert torch.equal(own, rows.flatten(0, 1).transpose(0, 1))


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [(1, 1), (1, 5), (3, 2)])
def test_every_head_sees_its_own_pages(queries, softcap, sinks, dtype, near, kind):
    logit_of_sink = torch.randn(HEADS * GROUP) if sinks else None
    page_view, keys, values, impl = made(kind, dtype, softcap, logit_of_sink)
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
        found = impl.attend(layer, query, page_view, batch)
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
    isa = _get_attn_isa(torch.float32, SIZE, DIM)
    cpu_layout.check_layout(HEADS, SIZE, DIM, torch.float32, isa)
    cpu_layout.check_layout.cache_clear()
    write = cpu_layout.ops.cpu_attn_reshape_and_cache
    monkeypatch.setattr(
        cpu_layout.ops, "cpu_attn_reshape_and_cache", lambda keys, values, *given: write(keys.flip(2), values, *given)
    )
    with pytest.raises(headwise.UnsupportedModelError, match="is not known"):
        cpu_layout.check_layout(HEADS, SIZE, DIM, torch.float32, isa)
    cpu_layout.check_layout.cache_clear()
    for shape in ((BLOCKS, SIZE, HEADS, DIM), (BLOCKS, 2, SIZE, HEADS, DIM), (BLOCKS, SIZE)):
        with pytest.raises(headwise.UnsupportedModelError, match="how vLLM lays out rows in"):
            FlashPages.of_cache(torch.zeros(shape), DIM, paged_attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_has_to_pass_a_trial(dtype):
    kernel = partial(paged_attention, softmax_scale=DIM**-0.5, softcap=0)
    check_kernel(kernel, dtype, torch.device("cpu"), DIM, SIZE)

    def in_one_piece(**given):
        """Takes pages to lie behind one another, whatever their strides."""
        pages = given["block_table"].clamp(max=given["k"].shape[0] // SIZE - 1) * SIZE
        return kernel(**{**given, "block_table": pages})

    with pytest.raises(headwise.UnsupportedModelError, match="does not read pages of single heads: it is off by"):
        check_kernel(in_one_piece, dtype, torch.device("cpu"), DIM, SIZE)
