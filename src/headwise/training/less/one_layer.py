"""One layer: what it was asked -> features with which its state answers best.

Dong et al., ICML 2024 (arXiv 2402.09398), section 3.3: every layer alone, by the squared error of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from headwise.errors import MismatchError
from headwise.less.features import LayerFeatures
from headwise.less.state import blend
from headwise.training.less.capture import Captured
from headwise.types import Float, Tensor


@dataclass(frozen=True)
class TrainingOptions:
    """How kernels are trained; the same for every layer.

    Attributes:
        features: of a query or key.
        width: hidden width of the networks.
        epochs: passes over the samples.
        batch: sequences in a step.
        rate: of Adam, at the start.
        halve_every: epochs after which the rate is halved, again and again.
        seed: of the first weights and of the order.
    """

    features: int = 8
    width: int = 64
    epochs: int = 8
    batch: int = 2
    rate: float = 3e-3
    halve_every: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What came of it, as errors of the layer's output on the samples that were kept apart.

    Attributes:
        kernels: of the best epoch.
        without: error without any memory.
        error: with the kernels.
        share: of the error without memory that is left, which long and short prompts count alike in.
        shares: the same, before the first epoch and after each.
    """

    kernels: LayerFeatures
    without: float
    error: float
    share: float
    shares: list[float]

    @property
    def figures(self) -> dict[str, float]:
        """The errors by name."""
        return dict(zip(FIGURES, (self.without, self.error, self.share), strict=True))


FIGURES = ("without", "with", "share")

# A layer's error below this, relative to the variance of its output, need not become smaller.
_NEGLIGIBLE = 1e-3

# What the last layer of the key network starts with: the state then has almost no effect.
_START = 1e-4


class TrainableFeatures(nn.Module):
    """The networks of one layer as they are trained.

    Args:
        heads, group: KV heads, and query heads of each.
        dim: of queries and keys.
        width: hidden.
        features: of a query or key.
    """

    def __init__(self, heads: int, group: int, dim: int, width: int, features: int) -> None:
        super().__init__()

        def uniform(*shape: int) -> nn.Parameter:
            bound = (6 / (shape[-2] + shape[-1])) ** 0.5
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

        self.query_in, self.query_out = uniform(heads, group, dim, width), uniform(heads, group, width, features)
        self.key_in, self.key_out = uniform(heads, dim, width), uniform(heads, width, features)
        self.key_last = uniform(heads, features, features)
        self.scale = nn.Parameter(torch.full((heads, features), _START))
        self.gain = nn.Parameter(torch.full((heads, features), _START))

    @classmethod
    def like(cls, kernels: LayerFeatures) -> TrainableFeatures:
        """Of the same sizes and with the same effect, on the same device."""
        heads, group, dim, width = kernels.query_in.shape
        made = cls(heads, group, dim, width, kernels.count).to(kernels.query_in.device)
        made.start_from(kernels)
        return made

    @torch.no_grad()
    def start_from(self, kernels: LayerFeatures) -> None:
        """Take over kernels that were trained before.

        Raises:
            MismatchError: when they have other sizes.
        """
        features = torch.eye(self.scale.shape[-1], device=self.scale.device)
        # The folded matrix has no one origin; this is one that gives it.
        parts = {**kernels.tensors(), "key_last": kernels.key_mix - features}
        del parts["key_mix"]
        self.scale.fill_(1)
        self.gain.fill_(1)
        for name, tensor in parts.items():
            mine = getattr(self, name)
            if mine.shape != tensor.shape:
                raise MismatchError(f"kernels to start from have {name} {tuple(tensor.shape)}, not {tuple(mine.shape)}")
            mine.copy_(tensor)

    def folded(self) -> LayerFeatures:
        """As inference needs them: what follows the key network's second GELU is one matrix."""
        eye = torch.eye(self.scale.shape[-1], device=self.scale.device)
        mix = self.scale.abs()[:, :, None] * (eye + self.key_last * self.gain[:, None, :])
        return LayerFeatures(self.query_in, self.query_out, self.key_in, self.key_out, mix)


def remembered(kernels: LayerFeatures, batch: Captured) -> Float[Tensor, "b h g q e"]:
    """What a layer with those kernels would have answered, differentiable."""
    queries = kernels.of_queries(batch.query)
    stages = int(batch.stage.max()) + 1
    at = torch.arange(stages, device=batch.fold.device)
    gone = (batch.fold[:, :, None, :] <= at[:, None]) & (batch.fold > 0)[:, :, None]
    keys = kernels.of_keys(batch.keys)[:, :, None] * gone[..., None]
    state = torch.einsum("bhknr,bhne->bhkre", keys, batch.values.float())
    chosen = torch.nn.functional.one_hot(batch.stage, stages).to(state.dtype)
    sums = torch.einsum("bhgqr,bqk,bhkre->bhgqe", queries, chosen, state)
    mass = torch.einsum("bhgqr,bqk,bhkr->bhgq", queries, chosen, keys.sum(dim=3))
    return blend(batch.exact.float(), batch.lse, sums, mass)


def train(
    kernels: TrainableFeatures,
    read: Callable[[Sequence[int]], Captured],
    samples: Sequence[int],
    checks: Sequence[int],
    projection: Float[Tensor, "hidden inner"] | None,
    options: TrainingOptions,
) -> Result:
    """Train the kernels of one layer.

    Args:
        read: gives the samples of those numbers side by side.
        samples, checks: to learn from, and to choose the best epoch by.
        projection: what the layer multiplies its heads' outputs with; None for nothing.
    """
    optimiser = torch.optim.Adam(kernels.parameters(), lr=options.rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, options.halve_every, 0.5)
    order = torch.Generator().manual_seed(options.seed)
    best, at = kernels.folded(), _check(kernels.folded(), read, checks, projection)
    found = [at]
    for _ in range(options.epochs):
        shuffled = [samples[place] for place in torch.randperm(len(samples), generator=order).tolist()]
        for start in range(0, len(shuffled), options.batch):
            batch = read(shuffled[start : start + options.batch])
            optimiser.zero_grad()
            share_left(remembered(kernels.folded(), batch), batch, projection).backward()
            optimiser.step()
        schedule.step()
        with torch.no_grad():
            folded = LayerFeatures(**{name: t.clone() for name, t in kernels.folded().tensors().items()})
        found.append(_check(folded, read, checks, projection))
        if found[-1].share == min(other.share for other in found):
            best, at = folded, found[-1]
    return Result(best, *at, [one.share for one in found])


def output_error(
    output: Float[Tensor, "b h g q e"], batch: Captured, projection: Float[Tensor, "hidden inner"] | None
) -> Float[Tensor, " b"]:
    """Squared error of a layer's output over the variance of what full attention gives, of every sequence."""

    def project(rows: Tensor) -> Tensor:
        flat = rows.float().permute(0, 3, 1, 2, 4).flatten(2)
        return flat if projection is None else flat @ projection.T

    error = project(output - batch.target).square().mean(dim=(1, 2))
    return error / project(batch.target).var(dim=(1, 2), correction=0)


def share_left(
    output: Float[Tensor, "b h g q e"], batch: Captured, projection: Float[Tensor, "hidden inner"] | None
) -> Tensor:
    """How much of the error of the kept rows alone is left, mean over the sequences: the loss.

    The error itself would be that of short prompts, where much is evicted of little; long ones would hardly count.
    """
    without = output_error(batch.exact, batch, projection)
    return (output_error(output, batch, projection) / (without + _NEGLIGIBLE)).mean()


class _Checked(NamedTuple):
    without: float
    error: float
    share: float


@torch.no_grad()
def _check(
    kernels: LayerFeatures,
    read: Callable[[Sequence[int]], Captured],
    checks: Sequence[int],
    projection: Float[Tensor, "hidden inner"] | None,
) -> _Checked:
    """Means over the sequences."""
    rows = []
    for number in checks:
        batch = read([number])
        output = remembered(kernels, batch)
        errors = (output_error(answer, batch, projection) for answer in (batch.exact, output))
        rows.append([*(float(error) for error in errors), float(share_left(output, batch, projection))])
    return _Checked(*torch.tensor(rows).mean(dim=0).tolist())
