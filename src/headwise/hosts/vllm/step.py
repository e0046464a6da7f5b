"""Step: a batch of vLLM, and which of its rows are compressed -> what attends over whole prompts, and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from headwise.hosts.vllm.choice import PromptBlocks
from headwise.hosts.vllm.door import ROWS, Row
from headwise.hosts.vllm.model import Model
from headwise.hosts.vllm.prompts import Prompt, tables
from headwise.hosts.vllm.spread import Chosen
from headwise.types import Float, Int, Tensor

# Steps after which a prompt that was begun is not expected to be gone on with. If it is, the policy does without what
# it asked before.
_PATIENCE = 200


@dataclass(frozen=True)
class Reading:
    """A compressed request whose prompt is being read.

    Attributes:
        asked: tokens of the batch that are of its prompt.
        complete: whether it is at its end with them.
        filled: ids of the blocks that its prompt lies in.
        blocks: of all its blocks.
        tokens: that it has after this step.
        later: tokens of the batch behind the prompt, where a request goes on that was put off; None where none are.
    """

    prompt: Prompt
    asked: slice
    complete: bool
    filled: Int[Tensor, " n"]
    blocks: Int[Tensor, " m"]
    tokens: int
    later: slice | None


@dataclass(frozen=True)
class Compacted:
    """Requests whose prompts were compacted; every head of each is a sequence.

    Attributes:
        tokens: of the batch.
        table, lengths: pages and rows of each sequence, by layer.
        starts: where the queries of each sequence begin, and where the last end.
        queries: of each request.
        heads: of each request.
    """

    tokens: Int[Tensor, " n"]
    table: Int[Tensor, "layers sequences width"]
    lengths: Int[Tensor, "layers sequences"]
    starts: Int[Tensor, " sequences_and_one"]
    queries: tuple[int, ...]
    heads: int

    def by_head(self, query: Float[Tensor, "n h g d"]) -> Float[Tensor, "rows g d"]:
        """Queries of one sequence behind one another, and sequences in order."""
        if max(self.queries) == 1:
            return query.reshape(-1, *query.shape[2:])
        return torch.cat([own.transpose(0, 1).flatten(0, 1) for own in query.split(self.queries)])

    def by_token(self, found: Float[Tensor, "rows g d"]) -> Float[Tensor, "n h g d"]:
        """The other way."""
        if max(self.queries) == 1:
            return found.view(-1, self.heads, *found.shape[1:])
        parts = found.split([self.heads * count for count in self.queries])
        return torch.cat([own.unflatten(0, (self.heads, -1)).transpose(0, 1) for own in parts])

    def of_head(self, head: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " requests_and_one"]]:
        """Rows of the sequences of one head, as `by_head` has them, and where they begin among themselves."""
        firsts, stops = (each[head :: self.heads].tolist() for each in (self.starts[:-1], self.starts[1:]))
        rows = torch.cat([torch.arange(first, stop, device="cpu") for first, stop in zip(firsts, stops, strict=True)])
        return rows, torch.tensor([0, *self.queries], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)


@dataclass
class Step:
    """A batch in parts.

    Attributes:
        layers: their indices in the group.
        chosen: of their prompts.
        whole: what attends over whole blocks; None where nothing does.
        whole_tokens: of the batch; None for the first of it.
        own: what vLLM's backend made of `whole`.
    """

    layers: dict[str, int]
    chosen: Chosen
    whole: CommonAttentionMetadata | None = None
    whole_tokens: Int[Tensor, " n"] | None = None
    readings: list[Reading] = field(default_factory=list)
    compacted: Compacted | None = None
    own: Any = None


class StepMaker:
    """Steps of one group of layers, which have their blocks in common.

    Args:
        layer_names: of the group, in order.
        heads: KV heads of a layer.
        block_size: tokens in a block.
        model: that they are layers of.

    Attributes:
        chosen: rows of prompts whose layers share what stays.
    """

    def __init__(self, layer_names: Sequence[str], heads: int, block_size: int, model: Model) -> None:
        self._layers = {name: index for index, name in enumerate(layer_names)}
        self._heads, self._size, self._model = heads, block_size, model
        self.chosen = Chosen()
        # By their first block, which is nobody else's as long as they hold it.
        self._prompts: dict[int, Prompt] = {}
        self._held: tuple[list[Prompt], list[int], tuple[Tensor, Tensor]] | None = None
        self._steps = 0

    def make(self, batch: CommonAttentionMetadata) -> Step | None:
        """Sort a batch; None where no request in it is compressed."""
        self._steps += 1
        rows = {index: row for index, row in ROWS.items() if index < batch.num_reqs}
        if not rows:
            return None
        starts, lengths = batch.query_start_loc_cpu.tolist(), batch.seq_lens.tolist()
        blocks_of_all = batch.block_table_tensor.cpu()
        step = Step(self._layers, self.chosen)
        whole: list[tuple[int, int, int, int]] = []
        compacted: list[tuple[Prompt, Tensor, int, slice]] = []
        for index in range(batch.num_reqs):
            first, stop, length = starts[index], starts[index + 1], lengths[index]
            before, row = length - (stop - first), rows.get(index)
            blocks = None if row is None else PromptBlocks.of(row.options, row.tokens, self._size)
            if row is None or blocks is None or blocks.stay == blocks.whole:
                whole.append((index, first, stop, length))
                continue
            table = blocks_of_all[index, : -(-length // self._size)]
            key = int(table[0])
            if before == 0:
                self._forget()
                self._prompts[key] = self._begun(row, blocks)
            prompt = self._prompts[key]
            prompt.step = self._steps
            if before >= row.tokens:
                compacted.append((prompt, table, length, slice(first, stop)))
                continue
            assert prompt.seen == before
            end = min(stop, first + row.tokens - before)
            prompt.seen = min(length, row.tokens)
            whole.append((index, first, end, prompt.seen))
            filled = table[: -(-row.tokens // self._size)]
            later = slice(end, stop) if end < stop else None
            complete = prompt.seen == row.tokens
            step.readings.append(Reading(prompt, slice(first, end), complete, filled, table, length, later))
        self._whole(step, batch, whole)
        if compacted:
            step.compacted = self._batch(*(list(each) for each in zip(*compacted, strict=True)))
        return step

    def _begun(self, row: Row, blocks: PromptBlocks) -> Prompt:
        kinds = self._model.kinds(row.options, row.ids)
        before = self.chosen.of(row.options, row.ids) if row.options.spreads else None
        return Prompt(row.options, blocks, len(self._layers), self._heads, kinds, before=before, ids=row.ids)

    def _forget(self) -> None:
        """Let go of what was asked by prompts that were not gone on with for long: their requests were cancelled."""
        for prompt in self._prompts.values():
            if prompt.asked and self._steps - prompt.step > _PATIENCE:
                prompt.asked.clear()

    def _whole(self, step: Step, batch: CommonAttentionMetadata, parts: Sequence[tuple[int, int, int, int]]) -> None:
        """What attends over whole blocks: the batch itself, or requests of it with all or some of their queries."""
        if not parts:
            return
        counts = [stop - first for _, first, stop, _ in parts]
        if sum(counts) == batch.num_actual_tokens and len(parts) == batch.num_reqs:
            step.whole = batch
            return
        index = torch.tensor([each[0] for each in parts], device="cpu")
        starts = torch.tensor([0, *counts], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        lengths = torch.tensor([each[3] for each in parts], dtype=batch.seq_lens.dtype, device="cpu")
        device = batch.seq_lens.device
        step.whole_tokens = torch.cat([torch.arange(first, stop, device="cpu") for _, first, stop, _ in parts])
        step.whole = replace(
            batch,
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(device),
            num_reqs=len(parts),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=int(lengths.max()),
            block_table_tensor=batch.block_table_tensor[index],
            slot_mapping=batch.slot_mapping[step.whole_tokens],
        )

    def _batch(self, prompts: list[Prompt], blocks: list[Tensor], lengths: list[int], tokens: list[slice]) -> Compacted:
        """Their tables are made anew when a request came or went, or has a block more."""
        counts, held = [len(own) for own in blocks], self._held
        # Prompts are compared as objects, which are held as long as they are; one has its blocks for as long as it is.
        same = held is not None and held[1] == counts
        if held is None or not same or any(one is not other for one, other in zip(held[0], prompts, strict=True)):
            self._held = held = (prompts, counts, tables(prompts, blocks))
        return batch_of(prompts, blocks, lengths, tokens, held[2])


def batch_of(
    prompts: Sequence[Prompt],
    blocks: Sequence[Tensor],
    lengths: Sequence[int],
    tokens: Sequence[slice],
    made: tuple[Tensor, Tensor] | None = None,
) -> Compacted:
    """Requests whose prompts were compacted.

    Args:
        blocks: ids of all blocks of each.
        lengths: tokens that each has.
        tokens: of the batch.
        made: what `tables` gave for them.
    """
    table, rows = tables(prompts, blocks) if made is None else made
    heads, queries = prompts[0].heads, tuple(each.stop - each.start for each in tokens)
    later = [length - prompt.blocks.candidates for prompt, length in zip(prompts, lengths, strict=True)]
    behind = torch.tensor(later, dtype=torch.int32, device="cpu").repeat_interleave(heads)
    starts = torch.tensor([0, *(count for count in queries for _ in range(heads))], dtype=torch.int32, device="cpu")
    at = torch.cat([torch.arange(each.start, each.stop, device="cpu") for each in tokens])
    return Compacted(at, table, rows + behind, starts.cumsum(0, dtype=torch.int32), queries, heads)
