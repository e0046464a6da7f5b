"""Layers that share what stays of a prompt, over caches of plain rows; without vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from headwise.hosts.vllm import spread
from headwise.hosts.vllm.choice import PromptBlocks
from headwise.hosts.vllm.micro_pages import MicroPages
from headwise.hosts.vllm.options import Options
from headwise.hosts.vllm.prompts import Prompt
from headwise.hosts.vllm.spread import Chosen, attend_before, compact
from headwise.types import LogitOptions

LAYERS, HEADS, SIZE, DIM, BLOCKS = 3, 2, 4, 8, 12
OPTIONS = Options("pyramidkv", 0.5)


@dataclass(frozen=True)
class RowPages(MicroPages):
    """Pages of all layers in one tensor `[layers, blocks, heads, size, 2 d]`, or of one that knows no others."""

    rows: torch.Tensor
    layer: int
    alone: bool = False

    @property
    def place(self):
        return self.layer * BLOCKS * HEADS

    @property
    def memory(self):
        return None if self.alone else self.rows.data_ptr()

    def read(self, blocks):
        found = self.rows[self.layer, blocks.long()].transpose(0, 1).flatten(1, 2)
        return found[..., :DIM].clone(), found[..., DIM:].clone()

    def write(self, pages, keys, values):
        numbers = pages.long() + self.place
        self.rows.flatten(0, 2)[numbers] = torch.cat([keys, values], dim=1).unflatten(0, (-1, SIZE))

    def attend(self, *_):
        raise NotImplementedError


def prompt_of(rows, alone=False, tokens=34):
    blocks = PromptBlocks.of(OPTIONS, tokens, SIZE)
    made = Prompt(OPTIONS, blocks, LAYERS, HEADS, ids=range(tokens))
    made.held = {layer: RowPages(rows, layer, alone) for layer in range(LAYERS)}
    made.summaries = dict.fromkeys(range(LAYERS))
    return made


@pytest.fixture
def choices(monkeypatch):
    """Rows as though a policy had chosen them: of all layers together, or of each alone."""
    torch.manual_seed(1)

    def choose(options, blocks, layers):
        assert (blocks.whole, blocks.stay) == (8, 4)
        pages = {3: [[7, 3], [5, 4], [4, 1]], 1: [[5, 3]]}[len(layers)]
        return [[torch.randperm(32)[: count * SIZE].sort().values for count in heads] for heads in pages]

    monkeypatch.setattr(spread, "choose_rows", choose)


@pytest.mark.parametrize("alone", [False, True])
def test_rows_of_all_layers_lie_in_the_first_blocks(choices, alone):
    rows, filled = torch.randn(LAYERS, BLOCKS, HEADS, SIZE, 2 * DIM), torch.tensor([9, 2, 11, 4, 0, 7, 5, 1, 3])
    before, prompt = rows.clone(), prompt_of(rows, alone)
    found = compact(prompt, filled, Chosen())
    assert not prompt.held and not prompt.summaries
    counts = [[len(own) // SIZE for own in heads] for heads in found]
    assert counts == ([[5, 3]] * 3 if alone else [[7, 3], [5, 4], [4, 1]])
    used = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            own = prompt.pages[layer, head, : counts[layer][head]].long() + layer * BLOCKS * HEADS
            used += own.tolist()
            # As they were, whoever lay there.
            wanted = before[layer, filled[:8], head].flatten(0, 1)[found[layer][head]]
            torch.testing.assert_close(rows.flatten(0, 2)[own].flatten(0, 1), wanted)
    # Every page of the four blocks that stay is used once, and no other was touched.
    assert len(set(used)) == len(used) == 4 * HEADS * LAYERS
    assert {number // HEADS % BLOCKS for number in used} == {9, 2, 11, 4}
    others = [block for block in range(BLOCKS) if block not in (9, 2, 11, 4)]
    assert torch.equal(rows[:, others], before[:, others])


def test_what_was_chosen_before_holds(choices):
    """For a prompt that is read again, and for an equal one that was begun before there was a choice."""
    rows, filled, chosen = torch.randn(LAYERS, BLOCKS, HEADS, SIZE, 2 * DIM), torch.arange(9), Chosen()
    first = compact(prompt_of(rows), filled, chosen)
    again, twin = prompt_of(rows), prompt_of(rows)
    again.before = chosen.of(OPTIONS, range(34))
    for prompt in (again, twin):
        found = compact(prompt, filled, chosen)
        assert all(
            torch.equal(a.int(), b.int())
            for one, two in zip(first, found, strict=True)
            for a, b in zip(one, two, strict=True)
        )
    assert chosen.of(OPTIONS, range(33)) is None and chosen.of(Options("pyramidkv", 0.25), range(34)) is None


def test_what_is_remembered_has_an_end(monkeypatch):
    monkeypatch.setattr(spread, "_MOST_BYTES", 10_000)
    chosen, rows = Chosen(), [[torch.arange(100)] * HEADS] * LAYERS
    each = 100 * 4 * HEADS * LAYERS + 36 * 10
    for number in range(9):
        chosen.note(OPTIONS, range(number, number + 10), rows)
        chosen.note(OPTIONS, range(number, number + 10), rows)
        assert chosen.bytes == min(number + 1, 10_000 // each) * each
    assert chosen.of(OPTIONS, range(8, 18)) is not None and chosen.of(OPTIONS, range(10)) is None


@pytest.mark.parametrize("sinks", [None, torch.tensor([[0.5, 1.0], [-1.0, 2.0]])])
def test_a_request_that_goes_on_sees_what_is_going_to_stay(sinks):
    torch.manual_seed(3)
    prompt, total, asked = prompt_of(torch.zeros(LAYERS, BLOCKS, HEADS, SIZE, 2 * DIM)), 40, 3
    prompt.before = [[torch.tensor([0, 5, 31]), torch.tensor([7])]] * LAYERS
    keys, values = torch.randn(2, HEADS, total, DIM)
    query = torch.randn(asked, HEADS, 2, DIM)
    found = attend_before(prompt, 1, query, keys, values, LogitOptions(0.4, None, sinks))
    for number in range(asked):
        for head in range(HEADS):
            seen = [*prompt.before[1][head].tolist(), *range(32, total - asked + number + 1)]
            for group in range(2):
                logits = query[number, head, group] @ keys[head, seen].T * 0.4
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head, group : group + 1]])
                wanted = logits.softmax(dim=0)[: len(seen)] @ values[head, seen]
                torch.testing.assert_close(found[number, head, group], wanted)
