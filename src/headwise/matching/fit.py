"""Fit: what outputs should be, and the rows that stay -> biases and values with which these stand for all rows.

Attention matching (Zweiger et al., arXiv 2602.16284, section 3): two ridge regressions for every KV head, in fp32,
whatever the model computes in. A row's bias is the logarithm of its weight, of how many rows it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headwise.matching.targets import HeadRows, Targets
from headwise.types import Float, Tensor

# The least and the most that a row may count for.
_LEAST, _MOST = 0.05, 1e4

# Columns whose products are made at a time: half of all products are never made.
_BLOCK = 128

# As far as its key is read off, a row's weight makes up for it on average, within these bounds.
_MISREAD = 5.0


def fitted(
    targets: Targets, rows: HeadRows, keys: Float[Tensor, "n d"], ridge: float, bias_ridge: float | None
) -> HeadRows:
    """The same rows with biases and values with which the outputs come near to the targets.

    Biases come first: with them the rows make the denominator that all rows make. Where there is no solution, as with
    numbers that are none, rows stay as they are.

    Args:
        rows: as they are read, with their own values.
        keys: of the same rows as they were, before any coding.
        ridge: what the squared change of values counts, in units of the mean over the rows of the squares of what
            queries give them.
        bias_ridge: the same for changes of the rows' weights; None leaves all weights 1.
    """
    mixture = _mixture(targets, rows, whole=bias_ridge is not None)
    weights = torch.ones_like(rows.keys[:, 0])
    if bias_ridge is not None:
        weights = _weights(mixture, targets.share, _misread(targets, rows, keys, mixture), bias_ridge)
        # As they are stored.
        biases = weights.log().half().float()
        rows, weights = replace(rows, biases=biases), biases.exp()
    # Errors of a query count by the square of the denominator that its rows make, which is near that of all rows.
    given = mixture.given @ weights
    wrong = given[:, None] * targets.output - (mixture.given * weights) @ rows.values
    return replace(rows, values=rows.values + mixture.solve(weights, wrong, ridge))


def _weights(
    mixture: _Mixture, share: Float[Tensor, " r"], first: Float[Tensor, " n"], ridge: float
) -> Float[Tensor, " n"]:
    """How many rows each stands for, so that all together make the denominators; near those given first.

    Least squares would have some below 0: these are held at the least, and the others are found once more.
    """
    free = torch.ones_like(first)
    for _ in range(2):
        change = mixture.solve(free, (share - mixture.given @ first)[:, None], ridge)[:, 0]
        weights = first + change
        low = weights < _LEAST
        if not bool(low.any()):
            break
        first, free = first.masked_fill(low, _LEAST), free.masked_fill(low, 0)
    return weights.clamp(_LEAST, _MOST)


def _misread(targets: Targets, rows: HeadRows, keys: Float[Tensor, "n d"], mixture: _Mixture) -> Float[Tensor, " n"]:
    """By how much less each row is given in all than with the key that it had."""
    if torch.equal(keys, rows.keys):
        return torch.ones_like(keys[:, 0])
    before = _given(targets, replace(rows, keys=keys), whole=True).sum(dim=0)
    found = before / mixture.given.sum(dim=0)
    return found.nan_to_num(nan=1.0).clamp(1 / _MISREAD, _MISREAD)


@dataclass(frozen=True)
class _Mixture:
    """What reference queries give rows.

    Attributes:
        given: by each query to each row, times the share of the query.
        gram: of its columns, where there are no more rows than queries.
    """

    given: Float[Tensor, "r n"]
    gram: Float[Tensor, "n n"] | None

    def solve(self, factor: Float[Tensor, " n"], right: Float[Tensor, "r m"], ridge: float) -> Float[Tensor, "n m"]:
        """Numbers x of the rows for which `given * factor @ x` is nearest to the right side; 0 where there are none.

        Of the two systems that have the same solution the smaller one is solved.

        Args:
            ridge: what the squares of x count, in units of the mean square of a column of `given * factor`.
        """
        if self.gram is None:
            given = self.given * factor
            system = _gram(given.T)
            factored, failed = _factored(system, ridge * system.diagonal().sum() / given.shape[1])
            found = given.T @ torch.cholesky_solve(right, factored)
        else:
            system = self.gram * factor * factor[:, None]
            factored, failed = _factored(system, ridge * system.diagonal().mean())
            found = torch.cholesky_solve((self.given.T @ right) * factor[:, None], factored)
        return found.where((failed == 0) & found.isfinite().all(), 0)


def _mixture(targets: Targets, rows: HeadRows, *, whole: bool) -> _Mixture:
    given = _given(targets, rows, whole=whole)
    return _Mixture(given, _gram(given) if given.shape[1] <= len(given) else None)


def _given(targets: Targets, rows: HeadRows, *, whole: bool) -> Float[Tensor, "r n"]:
    """What the references give rows, as a share of what they give the whole prompt, or these rows."""
    logits = targets.logits(slice(None), rows)
    given = logits.sub_(targets.mass[:, None]).exp_() if whole else logits.softmax(dim=-1)
    return given.mul_(targets.share[:, None])


def _gram(rows: Float[Tensor, "r n"]) -> Float[Tensor, "n n"]:
    """Products of all columns with one another; above the diagonal there may be anything."""
    count = rows.shape[1]
    gram = rows.new_empty(count, count)
    for start in range(0, count, _BLOCK):
        block = slice(start, start + _BLOCK)
        torch.mm(rows[:, block].T, rows[:, : start + _BLOCK], out=gram[block, : start + _BLOCK])
    return gram


def _factored(system: Float[Tensor, "n n"], more: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor with so much more on the diagonal, and whether there is none."""
    system.diagonal().add_(more.clamp(min=torch.finfo(torch.float32).tiny))
    factor, failed = torch.linalg.cholesky_ex(system)
    return factor, failed
