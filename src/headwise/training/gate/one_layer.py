"""One layer: what it had at hand and the scores that were found -> a gate that predicts their logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from headwise.gate.gate import LayerGate
from headwise.training.gate.capture import ScoredPrompt
from headwise.types import Float, Tensor

# Scores below this are all the same: nothing that is kept for them.
_FLOOR = 1e-6


@dataclass(frozen=True)
class TrainingOptions:
    """How gates are trained; the same for every layer.

    Attributes:
        width: hidden units.
        epochs: passes over the tokens.
        batch: tokens in a step.
        rate: of AdamW, at its highest.
        decay: of the weights.
        seed: of the first weights and of the order.
    """

    width: int = 256
    epochs: int = 8
    batch: int = 512
    rate: float = 3e-3
    decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        gate: of the best epoch.
        correlations: rank correlation on the prompts that were kept apart, after each epoch.
    """

    gate: LayerGate
    correlations: list[float]

    @property
    def correlation(self) -> float:
        """That of the gate."""
        return max(self.correlations)


class TrainableGate(nn.Module):
    """The network of one layer as it is trained: on numbers of about 1, to numbers of about 1.

    Args:
        inputs, target: of all tokens that are learnt from; their means and deviations are what 1 is.
        width: hidden.
    """

    def __init__(self, inputs: Float[Tensor, "n c"], target: Float[Tensor, "n h"], width: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs.shape[1], width, device=inputs.device)
        self.second = nn.Linear(width, target.shape[1], device=inputs.device)
        # What does not vary stays as it is.
        self.mean, scale = inputs.mean(dim=0), inputs.std(dim=0)
        self.scale = torch.where(scale > 0, scale, 1.0)
        self.level, spread = target.mean(dim=0), target.std(dim=0)
        self.spread = torch.where(spread > 0, spread, 1.0)

    def forward(self, inputs: Float[Tensor, "n c"]) -> Float[Tensor, "n h"]:
        """Scaled logarithms of the scores."""
        found: Tensor = self.second(functional.gelu(self.first((inputs - self.mean) / self.scale)))
        return found

    @torch.no_grad()
    def folded(self) -> LayerGate:
        """As inference needs it."""
        first, second = self.first, self.second
        level = self.level + second.bias * self.spread
        weights = (self.mean, self.scale, first.weight.T, first.bias, second.weight.T * self.spread, level)
        return LayerGate(*(weight.detach().clone() for weight in weights))


def train(learns: Sequence[ScoredPrompt], checks: Sequence[ScoredPrompt], options: TrainingOptions) -> Result:
    """Train the gate of one layer, with the rate rising and falling along a cosine.

    Args:
        learns, checks: prompts to learn from, and to choose the best epoch by.
    """
    inputs = torch.cat([prompt.inputs for prompt in learns])
    target = torch.cat([log_score(prompt.score) for prompt in learns])
    gate = TrainableGate(inputs, target, options.width)
    wanted = (target - gate.level) / gate.spread
    optimiser = torch.optim.AdamW(gate.parameters(), lr=options.rate, weight_decay=options.decay)
    steps = options.epochs * -(-len(inputs) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.rate, total_steps=steps)
    order = torch.Generator().manual_seed(options.seed)
    best, found = gate.folded(), list[float]()
    for _ in range(options.epochs):
        for rows in torch.randperm(len(inputs), generator=order).to(inputs.device).split(options.batch):
            optimiser.zero_grad()
            functional.smooth_l1_loss(gate(inputs[rows]), wanted[rows]).backward()
            optimiser.step()
            schedule.step()
        folded = gate.folded()
        found.append(correlation(folded, checks))
        if found[-1] == max(found):
            best = folded
    return Result(best, found)


def correlation(gate: LayerGate, prompts: Sequence[ScoredPrompt]) -> float:
    """Rank correlation of what the gate predicts with what was found: mean over the heads, and over the prompts."""
    every = [rank_correlation(gate.predict(prompt.inputs), prompt.score) for prompt in prompts]
    return float(torch.stack(every).mean())


def log_score(score: Float[Tensor, "t h"]) -> Float[Tensor, "t h"]:
    """Logarithms, of nothing too."""
    return score.clamp(min=_FLOOR).log()


def rank_correlation(one: Float[Tensor, "t h"], other: Float[Tensor, "t h"]) -> Float[Tensor, " h"]:
    """Spearman's, of every column; 0 where one of the two is the same for all."""
    pairs = zip(one.unbind(dim=1), other.unbind(dim=1), strict=True)
    found = [torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1] for a, b in pairs]
    return torch.stack(found).nan_to_num().to(one.dtype)


def _ranks(values: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Of equal values, the mean of their ranks; in fp64, or long prompts would round them."""
    _, at, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(dim=0) - (counts - 1).double() / 2
    return ranks[at]
