"""The store as a state machine: whatever is done to it in whatever order, rows are those of a plain list, and the
compiled kernels read what the reference reads. What does not fit is refused and changes nothing.

`make check-memory` runs it with the compiled kernels watched by sanitizers.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwise.errors import InputError
from headwise.kernels.backends import choose
from headwise.kernels.interface import AppendRequest, DecodeRequest
from headwise.quant.formats import Precision, RowFormat
from headwise.store.rows import Rows
from headwise.store.saved import load_store, save_store
from headwise.store.store import RowStore
from headwise.types import LogitOptions

CPU = torch.device("cpu")
PRECISIONS = [None, Precision((RowFormat(8, 8), RowFormat(4, 8, 2)), recent=3, sinks=1)]
# What a caller may hand over by mistake.
MISTAKES = {
    "wider keys": lambda keys, values, columns: (torch.cat([keys, keys], dim=-1), values, columns),
    "a value less": lambda keys, values, columns: (keys, values[:, :, 1:], columns),
    "a head less": lambda keys, values, columns: (keys[:, 1:], values[:, 1:], columns),
    "another batch": lambda keys, values, columns: (keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1), columns),
    "columns that are numbers": lambda keys, values, columns: (keys, values, columns.float()),
    "columns of others": lambda keys, values, columns: (keys, values, torch.cat([columns, columns])),
    "an axis less": lambda keys, values, columns: (keys[0], values[0], columns),
    "nowhere": lambda keys, values, columns: (keys.to("meta"), values.to("meta"), columns),
}


class StoreMachine(RuleBasedStateMachine):
    """Appends, evictions, choices of sequences, crops, and saved caches, in any order."""

    @initialize(
        batch=st.integers(1, 3),
        heads=st.integers(1, 3),
        dims=st.sampled_from([(4, 2), (8, 8), (12, 6)]),
        page=st.sampled_from([1, 3, 4, 16]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        scored=st.booleans(),
        biased=st.booleans(),
        precision=st.sampled_from(PRECISIONS),
        prompt=st.integers(0, 30),
        seed=st.integers(0, 2**31),
    )
    def begin(self, batch, heads, dims, page, dtype, scored, biased, precision, prompt, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.batch, self.heads, self.dims, self.dtype, self.scored = batch, heads, dims, dtype, scored
        self.kernels, self.reference = choose("cpu", CPU), choose("reference", CPU)
        self.page, self.precision, self.column = page, precision, prompt
        keep = self.chance(batch, heads, prompt, share=0.8)
        formats = torch.randint(-1, 2, (batch, heads), generator=self.random) if precision else None
        rows = self.rows(torch.arange(prompt), keep)
        kinds = {"page_size": page, "scored": scored, "precision": precision}
        self.store = RowStore(rows, **kinds, formats=formats)
        self.store.fill(rows)
        self.biased, self.prompt = biased, prompt
        if biased:
            self.store.bias(self.bias_of(self.store.kept_columns()))
        self.held = [set(lane.nonzero().flatten().tolist()) for lane in keep.flatten(0, 1)]

    # What is done to it.

    @rule(count=st.sampled_from([0, 1, 1, 1, 2, 5, 20]), padded=st.booleans())
    def append(self, count, padded):
        keys, values, columns = self.fresh(count)
        real = self.chance(self.batch, count, share=0.6) if padded else None
        scores = torch.rand(self.batch, self.heads, count, generator=self.random) if self.scored else None
        increments = torch.rand(self.batch, self.heads, self.store.longest) if self.scored else None
        self.store.append(keys, values, columns, real, scores, increments, self.kernels)
        for lane, held in enumerate(self.held):
            own = range(count) if real is None else real[lane // self.heads].nonzero().flatten().tolist()
            held |= {self.column + i for i in own}
        self.column += count

    @rule(share=st.sampled_from([0.0, 0.3, 0.9, 1.0]), spare=st.integers(0, 5))
    def evict(self, share, spare):
        keep = self.chance(self.batch, self.heads, self.store.longest, share=share) & self.store.occupied()
        self.note(keep)
        self.store.drop(keep, spare)

    @rule(count=st.integers(0, 7), share=st.sampled_from([0.0, 0.5, 1.0]))
    def commit(self, count, share):
        keep = self.chance(self.batch, self.heads, self.store.longest, share=share) & self.store.occupied()
        self.note(keep)
        columns = torch.arange(self.column, self.column + count)
        new = self.rows(columns, self.chance(self.batch, self.heads, count, share=0.7))
        for lane, held in enumerate(self.held):
            held |= {self.column + i for i in new.keep.flatten(0, 1)[lane].nonzero().flatten().tolist()}
        self.store.commit(keep, new)
        self.column += count

    @rule(columns=st.integers(0, 4))
    def crop(self, columns):
        columns = min(columns, self.column)
        if not self.store.can_forget(columns):
            return
        keep = (self.store.kept_columns() < self.column - columns) & self.store.occupied()
        self.note(keep)
        self.store.forget(columns, keep)
        self.column -= columns
        self.prompt = min(self.prompt, self.column)

    @rule(data=st.data())
    def select(self, data):
        chosen = data.draw(st.lists(st.sampled_from(range(self.batch)), max_size=4)) if self.batch else []
        self.store.select(torch.tensor(chosen, dtype=torch.long))
        self.held = [set(self.held[b * self.heads + h]) for b in chosen for h in range(self.heads)]
        self.batch = len(chosen)

    @rule()
    def save_and_load(self):
        state = {name: tensor.clone() for name, tensor in save_store(self.store).items()}
        self.store = load_store(state, page_size=self.page, precision=self.precision)

    # What must not be done.

    @precondition(lambda self: self.batch > 0)
    @rule(mistake=st.sampled_from(sorted(MISTAKES)), count=st.integers(1, 3))
    def mistake(self, mistake, count):
        keys, values, columns = MISTAKES[mistake](*self.fresh(count))
        self.store.reserve(count)
        scores = torch.rand(keys.shape[:-1]) if self.scored else None
        request = AppendRequest(self.store.view(), keys, values, columns, None, scores, None)
        with pytest.raises(InputError):
            self.kernels.append(request)
        query = keys[:, :, None, -1:] if keys.dim() == 4 else keys[:, None]
        if mistake not in ("columns that are numbers", "columns of others"):
            with pytest.raises(InputError):
                self.kernels.ragged_decode(DecodeRequest(query, self.store.view(), keys, values, None, self.options()))

    # What must hold.

    @invariant()
    def rows_are_those_of_the_list(self):
        rows = self.store.rows()
        assert len(self.held) == rows.keep.shape[0] * rows.keep.shape[1]
        for lane, (keep, columns) in enumerate(zip(rows.keep.flatten(0, 1), rows.columns.flatten(0, 1), strict=True)):
            own = columns[keep].tolist()
            assert len(own) == len(self.held[lane])
            assert set(own) == self.held[lane]
        if self.biased:
            torch.testing.assert_close(rows.biases[rows.keep], self.bias_of(rows.columns)[rows.keep])
        if self.precision is None:
            torch.testing.assert_close(rows.keys[rows.keep], self.key_of(rows.columns)[rows.keep], atol=0, rtol=0)
            torch.testing.assert_close(rows.values[rows.keep], self.value_of(rows.columns)[rows.keep], atol=0, rtol=0)

    @invariant()
    def the_compiled_kernels_read_what_the_reference_reads(self):
        keys, values, _ = self.fresh(2)
        shape = self.batch, self.heads, 3, 2, self.dims[0]
        query = torch.randn(shape, generator=self.random).to(self.dtype)
        mask = self.chance(self.batch, 2, self.column + 2, share=0.7)
        request = DecodeRequest(query, self.store.view(), keys, values, mask, self.options(), with_mass=True)
        found, expected = (kernels.ragged_decode(request) for kernels in (self.kernels, self.reference))
        close = {"atol": 2e-5, "rtol": 2e-5} if self.dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(found.output, expected.output, **close)
        torch.testing.assert_close(found.lse, expected.lse, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.on_kept, expected.on_kept, atol=1e-4, rtol=1e-4)

    # Helpers.

    def note(self, keep):
        columns = self.store.kept_columns().flatten(0, 1)
        for lane, named in enumerate(keep.flatten(0, 1)):
            self.held[lane] &= set(columns[lane][named].tolist())

    def chance(self, *shape, share):
        return torch.rand(shape, generator=self.random) < share

    def key_of(self, columns):
        """A row's key tells its column, whatever its type: both parts of it are small whole numbers."""
        parts = torch.stack([columns % 64, columns // 64 % 64], dim=-1).to(self.dtype)
        return parts.repeat_interleave(self.dims[0] // 2, dim=-1)

    def value_of(self, columns):
        return -self.key_of(columns)[..., : self.dims[1]]

    def bias_of(self, columns):
        """Rows of the prompt have one that tells their column, and those that came later have none."""
        return ((columns % 7 - 3) / 4).where(columns < self.prompt, 0).half()

    def fresh(self, count):
        columns = torch.arange(self.column, self.column + count)
        spread = columns.expand(self.batch, self.heads, -1)
        return self.key_of(spread), self.value_of(spread), columns

    def rows(self, columns, keep):
        spread = columns.to(torch.int32).expand(keep.shape)
        scores = torch.rand(keep.shape, generator=self.random) if self.scored else None
        return Rows.of(self.key_of(spread), self.value_of(spread), spread, scores, keep)

    def options(self):
        return LogitOptions(0.01, None, None)


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestStoreMachine = StoreMachine.TestCase
