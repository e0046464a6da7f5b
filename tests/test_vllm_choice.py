"""Rows that policies choose of a prompt in vLLM's blocks; without vLLM."""

from __future__ import annotations

import pytest
import torch

from headwise.gate.gate import LayerGate
from headwise.gate.inputs import gate_inputs
from headwise.hosts.vllm.choice import Asked, Known, PromptBlocks, choose_rows, mass_of, needs_mass, summary_of
from headwise.hosts.vllm.options import Options
from headwise.hosts.vllm.whole_pages import pages_of_heads, rows_in_pages
from headwise.types import Kind, LogitOptions

POLICIES = ("adakv:over=snapkv", "snapkv:window=5", "keydiff", "tova", "streamingllm", "keynorm")


def chosen(options, blocks, *given):
    """Rows of a single layer."""
    return choose_rows(options, blocks, [summary_of(options, blocks, *given)])


@pytest.mark.shapes
@pytest.mark.parametrize("words", POLICIES)
def test_rows_that_a_policy_chooses(words):
    """The best of the candidates, as the policy scores them, with what fills no block always kept."""
    torch.manual_seed(1)
    options, tokens, heads, size = Options(words, 0.4), 407, 3, 8
    blocks = PromptBlocks.of(options, tokens, size)
    queries, keys = torch.randn(1, heads, 2, tokens, 16), torch.randn(1, heads, tokens, 16)
    # A head that looks at few tokens, and others that look at all.
    keys[:, 0] *= 4
    values = torch.randn(1, heads, tokens, 16)
    (rows,) = chosen(options, blocks, Asked(queries), keys, values, LogitOptions(0.25), Known())
    assert sum(map(len, rows)) == blocks.stay * heads * size == 20 * 3 * 8
    assert all(len(own) % size == 0 and own.tolist() == sorted(set(own.tolist())) for own in rows)
    assert max(int(own.max()) for own in rows) < blocks.candidates == 400
    counts = {len(own) for own in rows}
    assert (len(counts) > 1) == words.startswith("adakv")
    if words == "streamingllm":
        assert all(own.tolist() == [*range(4), *range(400 - 156, 400)] for own in rows)
    if words == "keynorm":
        best = keys[0, :, :400].norm(dim=-1).argsort(dim=1)[:, :160].sort(dim=1).values
        assert [own.tolist() for own in rows] == best.tolist()
    if words == "tova":
        logits = (queries[0, :, :, -1:] @ keys[0, :, None].mT * 0.25).softmax(dim=-1)
        best = logits.mean(dim=(0, 1))[0, :400].argsort(descending=True)[:160].sort().values
        assert all(own.tolist() == best.tolist() for own in rows)


def asked_for(words, queries, keys, passes, ratio=0.4, size=8, kinds=None):
    """Rows that stay of a prompt that is read in so many passes."""
    options, tokens = Options(words, ratio), keys.shape[2]
    blocks, asked, end = PromptBlocks.of(options, tokens, size), Asked(queries), 0
    for part in queries.chunk(passes, dim=3):
        end += part.shape[3]
        mass = mass_of(options, blocks, part, keys[:, :, :end], LogitOptions(0.25))
        asked.mass = mass if asked.mass is None else asked.mass + mass
    (rows,) = chosen(options, blocks, asked, keys, keys, LogitOptions(0.25), Known(kinds))
    return rows, blocks, asked


def test_mass_of_a_prompt_in_parts():
    """Heavy hitters are those that got most attention from all queries, whatever passes they came in."""
    torch.manual_seed(2)
    tokens, heads = 211, 3
    queries, keys = torch.randn(1, heads, 2, tokens, 16), 3 * torch.randn(1, heads, tokens, 16)
    logits = queries @ keys[:, :, None].mT * 0.25
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    wanted = logits.masked_fill(~causal, -torch.inf).softmax(dim=-1).sum(dim=(2, 3))
    assert needs_mass(Options("h2o")) and needs_mass(Options("fastgen")) and not needs_mass(Options("adakv"))
    for passes in (1, 5):
        rows, blocks, asked = asked_for("h2o", queries, keys, passes)
        torch.testing.assert_close(asked.mass.score, wanted, rtol=1e-4, atol=1e-4)
        # Eleven of 26 blocks, and three tokens that fill none: half of these rows are the newest.
        assert (blocks.stay, blocks.rows) == (11, 91)
        recent = set(range(tokens - 46, blocks.candidates))
        for head, own in enumerate(rows):
            before = wanted[0, head, : tokens - 46].argsort(descending=True)[: 88 - len(recent)]
            assert set(own.tolist()) == recent | set(before.tolist())


def test_fastgen_gives_each_head_what_it_looks_at_within_a_given_size():
    """One head looks at punctuation, one at its neighbours, one at everything."""
    torch.manual_seed(3)
    tokens, size = 256, 8
    kinds = torch.zeros(1, tokens, dtype=torch.uint8)
    kinds[:, ::16] = int(Kind.PUNCTUATION)
    keys, queries = torch.zeros(1, 3, tokens, 16), torch.zeros(1, 3, 1, tokens, 16)
    keys[0, 0, ::16, 0] = queries[0, 0, ..., 0] = 8.0
    angle = torch.arange(tokens) / 40
    for vectors in (keys[0, 1], queries[0, 1, 0]):
        vectors[:, 0], vectors[:, 1] = 12 * angle.cos(), 12 * angle.sin()
    words = "fastgen:ladder=special+punctuation,special+punctuation+local,full,local=0.25"
    rows, blocks, asked = asked_for(words, queries, keys, 2, ratio=0.5, kinds=kinds)
    assert sum(map(len, rows)) == 3 * blocks.stay * size
    # What they need is 16, 76 and 256 rows, of 384: what is over goes to those that can have more.
    assert [len(own) for own in rows] == [24, 104, 256]
    assert set(range(0, tokens, 16)) <= set(rows[0].tolist())
    # What fills a page beyond that got the most attention of the others.
    others = asked.mass.score[0, 0].index_fill(0, torch.arange(0, tokens, 16), -1)
    assert set(rows[0].tolist()) - set(range(0, tokens, 16)) == set(others.topk(8).indices.tolist())
    assert set(range(tokens - 64, tokens)) <= set(rows[1].tolist())


def test_what_fills_no_block_stays_in_any_case():
    blocks, keys = PromptBlocks.of(Options("keynorm", 0.5), 45, 8), torch.randn(1, 2, 45, 16)
    known = summary_of(Options("keynorm", 0.5), blocks, Asked(keys[:, :, None]), keys, keys, LogitOptions(1), Known())
    assert blocks.candidates == 40
    assert known.tokens.pinned[0, 0].tolist() == [False] * 40 + [True] * 5
    assert bool(known.score[:, :, 40:].isposinf().all()) and bool(known.score[:, :, :40].isfinite().all())


def test_gates_say_what_stays():
    torch.manual_seed(4)
    tokens, heads, size, width = 200, 3, 8, 5
    keys, channels = torch.randn(1, heads, tokens, 16), heads * 16 + 4
    shapes = {"mean": channels, "scale": channels, "bias": width, "level": heads}
    gate = LayerGate(
        into=torch.randn(channels, width) / 9, out=torch.randn(width, heads),
        **{name: torch.rand(length) + 1 for name, length in shapes.items()} | {"level": torch.tensor([-9.0, -8, -10])},
    )  # fmt: skip
    options = Options("kvzip:gate=true", 0.5)
    blocks = PromptBlocks.of(options, tokens, size)
    (rows,) = chosen(options, blocks, Asked(keys[:, :, None, :0]), keys, keys, LogitOptions(1), Known(gate=gate))
    inputs = gate_inputs(keys, torch.arange(tokens)[None], torch.tensor([[[tokens]]]), None)
    scores = gate.predict(inputs)[0].T
    # The best of the layer, whatever their head, in as many pages as come nearest to them.
    scores[:, :4] = torch.inf
    keep = scores >= scores.flatten().sort(descending=True).values[blocks.rows * heads - 1]
    counts = keep.sum(dim=1)
    assert int(counts.min()) < 60 and int(counts.max()) > 140
    pages = pages_of_heads(counts, blocks.stay * heads, blocks.whole)
    wanted = rows_in_pages(keep, scores, pages, size)
    assert [own.tolist() for own in rows] == [own.tolist() for own in wanted]


def test_layers_that_share_what_stays():
    """PyramidKV gives lower layers more; gates whichever has the best rows; together as much as they may have."""
    torch.manual_seed(5)
    tokens, layers, size = 320, 4, 8
    network = torch.randn(36, 3) / 9, torch.randn(3), torch.randn(3, 2)
    for words in ("pyramidkv:window=4,steepness=4", "kvzip:gate=true", "fastgen:ladder=frequent,full,frequent=0.1"):
        options = Options(words, 0.25)
        assert options.spreads
        blocks, summaries = PromptBlocks.of(options, tokens, size), []
        for layer in range(layers):
            keys, queries = torch.randn(1, 2, tokens, 16), torch.randn(1, 2, 1, tokens, 16)
            keys[:, :, :20] *= 1 if layer % 2 else 6
            gate = LayerGate(torch.zeros(36), torch.ones(36), *network, torch.full((2,), -9.0 - layer))
            known = Known(gate=gate, layer=layer, layers=layers)
            asked = Asked(queries[..., -4:, :])
            if needs_mass(options):
                asked.mass = mass_of(options, blocks, queries, keys, LogitOptions(0.25))
            summaries.append(summary_of(options, blocks, asked, keys, keys, LogitOptions(0.25), known))
        rows = choose_rows(options, blocks, summaries)
        counts = [[len(own) // size for own in heads] for heads in rows]
        assert sum(map(sum, counts)) == blocks.stay * 2 * layers == 80
        assert all(count > 0 for heads in counts for count in heads)
        if words.startswith("pyramidkv"):
            # A mean of 80 rows, from 140 to 20 in equal steps: halves of pages go to one or the other.
            shares = torch.tensor([[17.5], [12.5], [7.5], [2.5]])
            assert bool(((torch.tensor(counts) - shares).abs() == 0.5).all())
        elif words.startswith("kvzip"):
            # Its level falls from layer to layer.
            assert sum(counts[0]) > sum(counts[1]) > sum(counts[3])
    assert not Options("adakv").spreads and not Options("h2o").spreads
