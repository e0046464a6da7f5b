"""Capture: a layer's queries, keys and values, pass by pass -> what it asks of a memory, and full attention's answers.

The policy itself decides what goes and when, in a cache like any other; only, a recorder stands where the memory would.
The model goes on with what full attention gives, so that no layer sees the errors of those before it (Dong et al., ICML
2024, section 3.3, train each layer alone on the inputs of the unchanged model).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.kernels.attention import dense_attention
from headwise.kernels.interface import AttentionMap
from headwise.less.state import EvictedState
from headwise.stages.layer import LayerCache
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


@dataclass(frozen=True)
class Captured:
    """One layer, some sequences: q query rows that came after the prompt, and n rows that were evicted.

    Attributes:
        query: as attention received it.
        exact, lse: attention over the kept rows, and the logarithm of its denominator.
        target: attention over everything.
        stage: how many evictions each query row came after.
        keys, values: of the evicted rows, head by head in the order in which they went.
        fold: the eviction by which each row went, counted from 1; 0 where there is no row.
    """

    query: Float[Tensor, "b h g q d"]
    exact: Float[Tensor, "b h g q e"]
    lse: Float[Tensor, "b h g q"]
    target: Float[Tensor, "b h g q e"]
    stage: Int[Tensor, "b q"]
    keys: Float[Tensor, "b h n d"]
    values: Float[Tensor, "b h n e"]
    fold: Int[Tensor, "b h n"]


class Recorder(EvictedState):
    """A state that writes down what it is given and asked, and remembers nothing."""

    def __init__(self) -> None:
        super().__init__(None)

    @property
    def remembers(self) -> bool:
        """It wants to see what is evicted."""
        return True

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._folded: list[tuple[Tensor, Tensor, Tensor]] = []
        self._asked: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self._count = 0

    def fold(
        self, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n e"], dropped: Bool[Tensor, "b h n"]
    ) -> None:
        """Write down the rows that go."""
        if bool(dropped.any()):
            self._count += 1
            self._folded.append((keys, values, dropped * self._count))

    def merge(
        self, query: Float[Tensor, "b h g q d"], output: Float[Tensor, "b h g q e"], lse: Float[Tensor, "b h g q"]
    ) -> Float[Tensor, "b h g q e"]:
        """Write down the question, and what the kept rows answer."""
        self._asked.append((query, output, lse, self._count))
        return output

    def captured(self, target: Float[Tensor, "b h g q e"]) -> Captured | None:
        """Everything written down; None where nothing was evicted."""
        if not self._folded:
            return None
        queries, outputs, logarithms, counts = zip(*self._asked, strict=True)
        query, exact, lse = (torch.cat(parts, dim=3) for parts in (queries, outputs, logarithms))
        stage = torch.cat([torch.full((part.shape[3],), count) for part, count in zip(queries, counts, strict=True)])
        keys, values, fold = (torch.cat([part[i] for part in self._folded], dim=2) for i in range(3))
        # Rows of each head move together, in their order.
        longest = int((fold > 0).sum(dim=-1).max())
        order = (fold == 0).to(torch.uint8).argsort(dim=-1, stable=True)[:, :, :longest]
        keys, values = (
            rows.gather(2, order[..., None].expand(*order.shape, rows.shape[-1])) for rows in (keys, values)
        )
        stages = stage.to(query.device).expand(len(query), -1)
        return Captured(query, exact, lse, target, stages, keys, values, fold.gather(2, order))


class WatchedLayer(LayerCache):
    """A layer that evicts as its policy says, and answers as if it never had.

    After the prompt it takes in as many tokens as lie between two evictions at a time, however many come.
    """

    def reset(self) -> None:
        """Forget everything."""
        self.evicted = self.recorder = Recorder()
        self._everything: tuple[Tensor, Tensor] | None = None
        self._targets: list[Tensor] = []
        super().reset()

    def attend(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "b h g q e"]:
        """Full attention; beside it, what the compressed cache makes of the same tokens."""
        if self.repetition_chunk is not None:
            return super().attend(query, keys, values, mask, options)
        before = self._everything
        everything: list[Tensor] = [
            new if before is None else torch.cat([before[i], new], dim=2) for i, new in enumerate((keys, values))
        ]
        self._everything = everything[0], everything[1]
        if self.store is None:
            return super().attend(query, keys, values, mask, options)
        exact = dense_attention(AttentionMap(query, everything[0], mask, options), everything[1])
        count, first = keys.shape[2], self.seen
        if self.log.columns == first:
            real = None if mask is None else mask.diagonal(first, -2, -1)
            self.log.extend(len(keys), count, real, keys.device)
        every = self.config.cache.evict_every
        for start in range(0, count, every):
            rows = slice(start, min(start + every, count))
            visible = None if mask is None else mask[:, rows, : first + rows.stop]
            super().attend(query[:, :, :, rows], keys[:, :, rows], values[:, :, rows], visible, options)
        self._targets.append(exact)
        return exact

    def captured(self) -> Captured | None:
        """What was written down; None where nothing was evicted or nothing came after the prompt."""
        return self.recorder.captured(torch.cat(self._targets, dim=3)) if self._targets else None
