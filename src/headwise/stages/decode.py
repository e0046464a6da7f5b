"""5/7 decode: queries of new tokens over each head's kept rows -> attention output and the mass on every row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headwise.errors import CacheStateError
from headwise.kernels.attention import query_blocks
from headwise.kernels.interface import Decoded, DecodeRequest, Kernels
from headwise.less.state import EvictedState
from headwise.stages.mass_profile import MassProfile
from headwise.stages.steered import LayerMarks
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


@dataclass
class Pass:
    """Tokens of one forward pass.

    Attributes:
        mask: True where a query may see a column; None means causal and no padding.
        marks: of its columns, where attention is steered.
        profiled: what its queries give every column of the prompt, where it came with their attention.
        mass: on the kept rows and on one another, where a rule ranks by it and they were decoded over a store.
    """

    query: Float[Tensor, "b h g q d"]
    keys: Float[Tensor, "b h q d"]
    values: Float[Tensor, "b h q e"]
    mask: Bool[Tensor, "b q t"] | None
    options: LogitOptions
    marks: Float[Tensor, "b q"] | None = None
    mass: tuple[Float[Tensor, "b h q n"], Float[Tensor, "b h q f"]] | None = None
    profiled: MassProfile | None = None

    def cut(self, kept: int) -> None:
        """Leave out all but the first tokens."""
        self.query = self.query[:, :, :, :kept]
        self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
        self.profiled = None

    def join(self, again: Pass) -> None:
        """Take note of what a further layer asked that reads the same rows: heads of one more group.

        Raises:
            CacheStateError: when it asked for fewer tokens, so that nothing can be said of what its heads look at.
        """
        if again.query.shape[3] != self.query.shape[3]:
            raise CacheStateError(
                f"a layer that reads another's keys asked for {again.query.shape[3]} of {self.query.shape[3]} tokens, "
                "and the policy looks at all of them: call the model with logits_to_keep=0"
            )
        self.query = torch.cat([self.query, again.query], dim=2)
        if self.options.sinks is not None and again.options.sinks is not None:
            self.options = replace(self.options, sinks=torch.cat([self.options.sinks, again.options.sinks], dim=1))
        if self.mass is not None and again.mass is not None:
            self.mass = self.mass[0] + again.mass[0], self.mass[1] + again.mass[1]

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to, but for the mask, which all layers share."""
        profiled = [] if self.profiled is None else self.profiled.tensors()
        return [self.keys, self.values, self.query, *(self.mass or ()), *profiled]

    def received(self, real: Bool[Tensor, "b q"] | None) -> tuple[Tensor | None, Tensor | None]:
        """What its tokens add to the scores of kept rows, and give one another; None where nothing is scored."""
        if self.mass is None:
            return None, None
        (on_kept, on_fresh), kept = self.mass, self.keys.shape[2]
        if kept < on_fresh.shape[3]:
            on_kept, on_fresh = on_kept[:, :, :kept], on_fresh[:, :, :kept, :kept]
        return received(on_kept, real), received(on_fresh, real)


def decode_pass(
    current: Pass, store: RowStore, evicted: EvictedState, *, with_mass: bool, kernels: Kernels, marks: LayerMarks
) -> Float[Tensor, "b h g q e"]:
    """Attend with new tokens over the store, what is remembered of evicted rows, and themselves.

    The same in a pass of any kind and in a step that is captured.
    """
    current.keys, current.values = store.stored(current.keys, current.values)
    rows = current.keys, current.values
    request = DecodeRequest(current.query, store.view(), *rows, current.mask, current.options, with_mass)
    decoded = decode(marks.decode(request, kernels, current.marks), kernels)
    if decoded.on_kept is not None and decoded.on_fresh is not None:
        current.mass = decoded.on_kept, decoded.on_fresh
    return evicted.merge(current.query, decoded.output.to(current.query.dtype), decoded.lse)


def append_pass(
    current: Pass, columns: Int[Tensor, " q"], real: Bool[Tensor, "b q"] | None, store: RowStore, kernels: Kernels
) -> None:
    """Take the rows of a pass into the store, and what its tokens looked at into the scores.

    Args:
        columns: of its tokens.
        real: which of them are no padding; None where all are.
    """
    increments, scores = current.received(real)
    store.append(current.keys, current.values, columns, real, scores, increments, kernels)


def fresh_rows(current: Pass, columns: Int[Tensor, " q"], real: Bool[Tensor, "b q"] | None, store: RowStore) -> Rows:
    """The rows of a pass beside the store, where it is to be seen first which of them stay; scores as `append_pass`."""
    increments, scores = current.received(real)
    if increments is not None:
        store.add_scores(increments)
    spread = columns.expand(*current.keys.shape[:2], -1)
    written = torch.ones_like(spread, dtype=torch.bool) if real is None else real[:, None].expand_as(spread)
    return Rows.of(current.keys, current.values, spread, scores, written)


def decode(request: DecodeRequest, kernels: Kernels) -> Decoded:
    """Attend with a few queries, or with many of them a few at a time.

    Without a mask the last q of the fresh rows are the queries' own.
    """
    queries, fresh, mask, marks = request.query.shape[3], request.fresh_keys.shape[2], request.mask, request.marks
    held = sum(view.longest for view in request.pages)
    blocks = [slice(1)] if queries == 1 else list(query_blocks(request.query, held + fresh))
    if len(blocks) == 1:
        return kernels.ragged_decode(request)
    parts = []
    for block in blocks:
        # Without a mask a query sees the fresh rows up to its own, which is the last that its block is given.
        upto = fresh if mask is not None else fresh - queries + block.stop
        part = replace(
            request,
            query=request.query[:, :, :, block],
            fresh_keys=request.fresh_keys[:, :, :upto],
            fresh_values=request.fresh_values[:, :, :upto],
            mask=None if mask is None else mask[:, block],
            marks=None if marks is None else marks.cut(block, upto),
        )
        parts.append(kernels.ragged_decode(part))
    return _joined(parts, fresh)


def received(mass: Float[Tensor, "b h q n"], real: Bool[Tensor, "b q"] | None) -> Float[Tensor, "b h n"]:
    """Mass from all query rows; a padding query attends to nothing that counts."""
    if real is not None:
        mass = mass * real[:, None, :, None]
    return mass[:, :, 0] if mass.shape[2] == 1 else mass.sum(dim=2)


def _joined(parts: list[Decoded], fresh: int) -> Decoded:
    def along(dim: int, name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=dim)

    if parts[0].on_fresh is None:
        return Decoded(along(3, "output"), along(3, "lse"), None, None)
    on_fresh = [torch.nn.functional.pad(p.on_fresh, (0, fresh - p.on_fresh.shape[-1])) for p in parts]  # type: ignore[arg-type, union-attr]  # all or none
    return Decoded(along(3, "output"), along(3, "lse"), along(2, "on_kept"), torch.cat(on_fresh, dim=2))
