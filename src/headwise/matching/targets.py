"""Targets: queries and all rows of a prompt -> what the outputs of one KV head should be, and how far off rows are.

In fp32, whatever the model computes in, a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from headwise.types import Float, LogitOptions, Tensor

# Logits in flight at a time.
_BLOCK_LOGITS = 2**20

# One reference in so many is not fitted to: it tells what the fit is worth.
_TESTED = 10


@dataclass(frozen=True)
class HeadRows:
    """Rows of one KV head, in fp32.

    Attributes:
        biases: added to their logits; None for none.
        marks: added to their logits, times a query's gate, where attention is steered; None where it is not.
    """

    keys: Float[Tensor, "n d"]
    values: Float[Tensor, "n e"]
    biases: Float[Tensor, " n"] | None = None
    marks: Float[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Targets:
    """What the outputs of one KV head should be.

    Attributes:
        query: of the references.
        output: what the rows of the prompt gave each.
        mass: natural logarithm of the denominator that these rows made.
        share: of a query's attention that went to the prompt, not to a sink logit: its error counts by the square.
        peaks: the most that any of the queries gave each row.
        options: how the model makes logits.
        gates: of the references, where attention is steered; None where it is not.
    """

    query: Float[Tensor, "r d"]
    output: Float[Tensor, "r e"]
    mass: Float[Tensor, " r"]
    share: Float[Tensor, " r"]
    peaks: Float[Tensor, " t"]
    options: LogitOptions
    gates: Float[Tensor, " r"] | None = None

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        held = [self.query, self.output, self.mass, self.share, self.peaks]
        return held if self.gates is None else [*held, self.gates]

    def logits(self, block: slice, rows: HeadRows) -> Float[Tensor, "r n"]:
        """Logits of rows for some of the references."""
        return logits_of(self.query[block], rows, self.options, None if self.gates is None else self.gates[block])

    @property
    def size(self) -> Tensor:
        """Sum of squares of the outputs, weighted as errors are."""
        return (self.share[:, None] * self.output).square().sum()

    def at_most(self, count: int) -> Targets:
        """So many of them, at equal distances."""
        if len(self.query) <= count:
            return self
        # Picked by a list: a slice would hold on to all of them.
        at = (torch.arange(count, device=self.query.device) + 0.5) * (len(self.query) / count)
        return self._those(at.long())

    def split(self) -> tuple[Targets, Targets]:
        """Those to fit to and those to test with; the same where there are too few."""
        tested = torch.arange(len(self.query), device=self.query.device) % _TESTED == _TESTED - 1
        return (self._those(~tested), self._those(tested)) if len(self.query) >= _TESTED else (self, self)

    def _those(self, named: Tensor) -> Targets:
        query, output, mass, share = (each[named] for each in (self.query, self.output, self.mass, self.share))
        gates = None if self.gates is None else self.gates[named]
        return Targets(query, output, mass, share, self.peaks, self.options, gates)


def targets_of(
    query: Float[Tensor, "r d"],
    sinks: Float[Tensor, " r"] | None,
    rows: HeadRows,
    options: LogitOptions,
    gates: Float[Tensor, " r"] | None = None,
) -> Targets:
    """What the rows of a prompt give some queries.

    Args:
        sinks: the sink logit of each query's head, where there are any.
        rows: all that are no padding.
        gates: of the queries, where attention is steered.
    """
    output, mass = query.new_empty(len(query), rows.values.shape[1]), query.new_empty(len(query))
    share, peaks = torch.ones_like(mass), torch.zeros_like(rows.keys[:, 0])
    for block in _blocks(query, rows):
        logits = logits_of(query[block], rows, options, None if gates is None else gates[block])
        given = logits.softmax(dim=-1)
        # What a query gives most is e to its largest logit, over the denominator.
        mass[block] = logits.amax(dim=-1) - given.amax(dim=-1).log()
        torch.mm(given, rows.values, out=output[block])
        if sinks is not None:
            share[block] = torch.sigmoid(mass[block] - sinks[block])
            given = given * share[block, None]
        peaks = peaks.maximum(given.amax(dim=0))
    return Targets(query, output, mass, share, peaks, options, gates)


def squared_error(targets: Targets, rows: HeadRows) -> Tensor:
    """Of the outputs that the rows give, weighted and summed."""
    total = rows.values.new_zeros(())
    for block in _blocks(targets.query, rows):
        weights = targets.logits(block, rows).softmax(dim=-1)
        off = targets.share[block, None] * (targets.output[block] - weights @ rows.values)
        total = total + off.square().sum()
    return total


def logits_of(
    query: Float[Tensor, "r d"], rows: HeadRows, options: LogitOptions, gates: Float[Tensor, " r"] | None
) -> Float[Tensor, "r n"]:
    """Logits of rows, their biases and what they are steered by included."""
    logits = query @ rows.keys.T * options.scaling
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    if gates is not None and rows.marks is not None:
        logits = logits + gates[:, None] * rows.marks
    return logits if rows.biases is None else logits + rows.biases


def _blocks(query: Float[Tensor, "r d"], rows: HeadRows) -> Iterator[slice]:
    step = max(1, _BLOCK_LOGITS // max(1, len(rows.keys)))
    for start in range(0, len(query), step):
        yield slice(start, min(start + step, len(query)))
