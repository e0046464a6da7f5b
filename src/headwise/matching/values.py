"""Values: kept rows, everything that there was, and reference queries -> values with which outputs are as before.

Attention matching (Zweiger et al., arXiv 2602.16284, section 3): ridge regression, one system for every KV head, in
fp32, whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from headwise.types import Bool, Float, LogitOptions, Tensor

# Logits in flight at a time.
_BLOCK_LOGITS = 2**20

# One reference in so many is not fitted to: it tells what the fit is worth.
_TESTED = 10


@dataclass(frozen=True)
class HeadRows:
    """Rows of one KV head, in fp32."""

    keys: Float[Tensor, "n d"]
    values: Float[Tensor, "n e"]


@dataclass(frozen=True)
class Targets:
    """What the outputs of one KV head should be.

    Attributes:
        query: of the references.
        output: what the rows of the prompt gave each.
        share: of a query's attention that went to the prompt, not to a sink logit: its error counts by the square.
        options: how the model makes logits.
    """

    query: Float[Tensor, "r d"]
    output: Float[Tensor, "r e"]
    share: Float[Tensor, " r"]
    options: LogitOptions

    @property
    def size(self) -> Tensor:
        """Sum of squares of the outputs, weighted as errors are."""
        return (self.share[:, None] * self.output).square().sum()

    def split(self) -> tuple[Targets, Targets]:
        """Those to fit to and those to test with; the same where there are too few."""
        tested = torch.arange(len(self.query), device=self.query.device) % _TESTED == _TESTED - 1
        return (self._those(~tested), self._those(tested)) if len(self.query) >= _TESTED else (self, self)

    def _those(self, named: Bool[Tensor, " r"]) -> Targets:
        return Targets(self.query[named], self.output[named], self.share[named], self.options)


def targets_of(
    query: Float[Tensor, "r d"], sinks: Float[Tensor, " r"] | None, rows: HeadRows, options: LogitOptions
) -> Targets:
    """What the rows of a prompt give some queries.

    Args:
        sinks: the sink logit of each query's head, where there are any.
        rows: all that are no padding.
    """
    output, share = query.new_empty(len(query), rows.values.shape[1]), query.new_ones(len(query))
    for block in _blocks(query, rows):
        logits = _logits(query[block], rows, options)
        output[block] = logits.softmax(dim=-1) @ rows.values
        if sinks is not None:
            share[block] = torch.sigmoid(logits.logsumexp(dim=-1) - sinks[block])
    return Targets(query, output, share, options)


def refitted(targets: Targets, rows: HeadRows, ridge: float) -> Float[Tensor, "n e"]:
    """Values of the rows with which the outputs come near to the targets, and which are near their own.

    They minimise the squared error, weighted, and `ridge` times the squared change of values, in units of the mean
    over the rows of the weighted squares of what queries give them. Where that has no solution, as with numbers that
    are none, they are their own.
    """
    parts = [targets.share[block, None] * weights for block, weights in _attention(targets, rows)]
    weights = torch.cat(parts) if parts else rows.values.new_zeros(0, len(rows.keys))
    wrong = targets.share[:, None] * targets.output - weights @ rows.values
    # Of the two systems that have the same solution the smaller one.
    by_row = len(rows.keys) <= len(targets.query)
    system = weights.T @ weights if by_row else weights @ weights.T
    least = ridge * weights.square().sum() / len(rows.keys)
    system.diagonal().add_(least.clamp(min=torch.finfo(torch.float32).tiny))
    factor, failed = torch.linalg.cholesky_ex(system)
    if by_row:
        change = torch.cholesky_solve(weights.T @ wrong, factor)
    else:
        change = weights.T @ torch.cholesky_solve(wrong, factor)
    return rows.values + change.where((failed == 0) & change.isfinite().all(), 0)


def squared_error(targets: Targets, rows: HeadRows) -> Tensor:
    """Of the outputs that the rows give, weighted and summed."""
    total = rows.values.new_zeros(())
    for block, weights in _attention(targets, rows):
        off = targets.share[block, None] * (targets.output[block] - weights @ rows.values)
        total = total + off.square().sum()
    return total


def _attention(targets: Targets, rows: HeadRows) -> Iterator[tuple[slice, Tensor]]:
    """What queries give the rows, a few queries at a time."""
    for block in _blocks(targets.query, rows):
        yield block, _logits(targets.query[block], rows, targets.options).softmax(dim=-1)


def _logits(query: Float[Tensor, "r d"], rows: HeadRows, options: LogitOptions) -> Float[Tensor, "r n"]:
    logits = query @ rows.keys.T * options.scaling
    return logits if options.softcap is None else torch.tanh(logits / options.softcap) * options.softcap


def _blocks(query: Float[Tensor, "r d"], rows: HeadRows) -> Iterator[slice]:
    step = max(1, _BLOCK_LOGITS // max(1, len(rows.keys)))
    for start in range(0, len(query), step):
        yield slice(start, min(start + step, len(query)))
