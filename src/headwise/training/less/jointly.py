"""Jointly: traces -> features of all layers at once, with which the model predicts what it does with a full cache.

What each layer's kernels get wrong changes what the layers behind it are asked, and not every error matters to what the
model says. So the second part of training follows the gradient of the predictions through the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from headwise.files import whole_file
from headwise.less.features import LayerFeatures
from headwise.training.less.one_layer import TrainableFeatures
from headwise.training.less.replay import predict
from headwise.training.less.trace import EvictionTrace
from headwise.types import Float, Tensor

# Steps after which the state is written down.
_SAVE_EVERY = 10

# Of a run, what is kept as it is.
_PLAIN = ("step", "without", "divergences", "chosen")

# Adam's second moment looks back over so many steps: there are only some hundreds.
_BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class JointOptions:
    """How all layers are trained jointly.

    Attributes:
        epochs: passes over the traces.
        batch: traces in a step.
        rate: of Adam, at the start; it falls to nothing along half a cosine.
        clip: no gradient is longer.
        seed: of the order.
    """

    epochs: int = 0
    batch: int = 1
    rate: float = 1e-3
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class JointResult:
    """What came of it, as divergence from the full cache's predictions on the traces that were kept apart.

    Attributes:
        layers: the kernels after the best epoch.
        without: mean divergence without any memory, nats per token.
        divergences: with the kernels, before the first epoch and after each.
    """

    layers: dict[int, LayerFeatures]
    without: float
    divergences: list[float]


def divergence(full: Float[Tensor, "q vocabulary"], ours: Float[Tensor, "q vocabulary"]) -> Float[Tensor, " q"]:
    """Kullback-Leibler divergence of every prediction from the full cache's, in nats."""
    return functional.kl_div(ours, full, reduction="none", log_target=True).sum(dim=-1)


def loss(full: Float[Tensor, "q vocabulary"], ours: Float[Tensor, "q vocabulary"]) -> Float[Tensor, ""]:
    """Mean of the divergences, each as log(1 + divergence).

    A few predictions of a passage, names that are copied from far back, carry most of the divergence: in a plain mean
    a step would follow them and hardly anything else. The logarithm leaves small ones as they are, and lets large ones
    count less.
    """
    return divergence(full, ours).clamp(min=0).log1p().mean()


def train_jointly(
    model: PreTrainedModel,
    start: Mapping[int, LayerFeatures],
    learns: Sequence[Path],
    checks: Sequence[Path],
    options: JointOptions,
    state: Path,
    tell: Callable[[int, int], None],
) -> JointResult:
    """Train the kernels of all layers.

    Args:
        start: kernels to start from.
        learns, checks: traces to learn from, and to choose the best epoch by.
        state: file that the run is kept in, and gone on from where it exists.
        tell: called with steps done and all steps.
    """
    device, dtype = model.device, model.dtype
    run = _Run.begin(start, options, math.ceil(len(learns) / options.batch), device)
    if state.is_file():
        run.restore(torch.load(state, map_location=device, weights_only=True))

    def check(kernels: Mapping[int, LayerFeatures]) -> float:
        with torch.no_grad():
            traces = (EvictionTrace.load(path, device, dtype) for path in checks)
            each = [float(divergence(trace.full, predict(model, trace, kernels)).mean()) for trace in traces]
        return sum(each) / len(each)

    with _frozen(model):
        if not run.divergences:
            run.without = check({})
            run.judge(check(run.kernels()))
        while run.step < run.steps:
            tell(run.step, run.steps)
            paths = run.next_batch(learns)
            run.optimiser.zero_grad()
            for path in paths:
                trace = EvictionTrace.load(path, device, dtype)
                (loss(trace.full, predict(model, trace, run.kernels())) / len(paths)).backward()
            run.advance()
            if run.at_end_of_epoch:
                run.judge(check(run.kernels()))
            if run.at_end_of_epoch or run.step % _SAVE_EVERY == 0:
                run.save(state)
        tell(run.steps, run.steps)
    return JointResult(run.best(), run.without, run.divergences)


@dataclass
class _Run:
    """Everything that changes from step to step."""

    layers: dict[int, TrainableFeatures]
    options: JointOptions
    optimiser: torch.optim.Adam
    schedule: torch.optim.lr_scheduler.LRScheduler
    steps_of_epoch: int
    step: int = 0
    without: float = 0.0
    divergences: list[float] = field(default_factory=list)
    chosen: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, start: Mapping[int, LayerFeatures], options: JointOptions, steps_of_epoch: int, device: torch.device
    ) -> _Run:
        layers = {index: TrainableFeatures.like(kernels.to(device)) for index, kernels in start.items()}
        parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=options.rate, betas=_BETAS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, options.epochs * steps_of_epoch))
        return cls(layers, options, optimiser, schedule, steps_of_epoch)

    @property
    def steps(self) -> int:
        return self.options.epochs * self.steps_of_epoch

    @property
    def at_end_of_epoch(self) -> bool:
        return self.step % self.steps_of_epoch == 0

    def kernels(self) -> dict[int, LayerFeatures]:
        return {index: layer.folded() for index, layer in self.layers.items()}

    def next_batch(self, learns: Sequence[Path]) -> list[Path]:
        epoch, place = divmod(self.step, self.steps_of_epoch)
        order = torch.randperm(len(learns), generator=torch.Generator().manual_seed(self.options.seed + epoch)).tolist()
        return [learns[i] for i in order[place * self.options.batch : (place + 1) * self.options.batch]]

    def advance(self) -> None:
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.options.clip)
        self.optimiser.step()
        self.schedule.step()
        self.step += 1

    def judge(self, found: float) -> None:
        """Take note of the divergence, and of the kernels where it is the lowest so far."""
        self.divergences.append(found)
        if found == min(self.divergences):
            self.chosen = {
                index: {name: tensor.detach().clone() for name, tensor in kernels.tensors().items()}
                for index, kernels in self.kernels().items()
            }

    def best(self) -> dict[int, LayerFeatures]:
        return {index: LayerFeatures(**tensors) for index, tensors in self.chosen.items()}

    def save(self, path: Path) -> None:
        whole = {
            "layers": {index: layer.state_dict() for index, layer in self.layers.items()},
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            **{name: getattr(self, name) for name in _PLAIN},
        }
        with whole_file(path) as scratch:
            torch.save(whole, scratch)

    def restore(self, whole: dict[str, Any]) -> None:
        for index, layer in self.layers.items():
            layer.load_state_dict(whole["layers"][index])
        self.optimiser.load_state_dict(whole["optimiser"])
        self.schedule.load_state_dict(whole["schedule"])
        for name in _PLAIN:
            setattr(self, name, whole[name])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Gradients go through the model and not to its weights."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
