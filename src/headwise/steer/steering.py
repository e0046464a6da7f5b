"""Steering: heads and how far -> the marks of a prompt's columns, and the gate of every query head of a layer.

What a mark adds to a logit, it multiplies the attention by, before that is made one again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from headwise.errors import ConfigurationError, MismatchError
from headwise.steer.heads import Heads, made_for, read_heads
from headwise.types import Bool, Float, Tensor

Profile = Literal["steered", "plain"]

_Way = TypeVar("_Way", bound="BaseSteering")


@dataclass(frozen=True)
class LayerSteering:
    """How one layer is steered.

    Attributes:
        gates: fp32, of each query head; 0 for those that are left alone.
        target: share of a query's attention that what is marked gets at least; None where marks say all.
        profiled: whether policies look at the attention that comes of it.
    """

    gates: Float[Tensor, "h g"]
    target: float | None
    profiled: bool


@dataclass(frozen=True)
class BaseSteering(ABC):
    """What all ways of steering have in common.

    Args:
        heads: query heads by layer, a list of layers of which all are meant, a JSON file of either, or None for every
            head of every layer of full attention.
        profile: whether policies look at the attention that was "steered", as decoding uses it, or at the "plain" one.

    Raises:
        ConfigurationError: when heads or an option are none.
        InputError: when there is no such file.
    """

    heads: Mapping[Any, Sequence[int] | None] | Sequence[int] | str | Path | None
    profile: Profile = field(default="steered", kw_only=True)

    def __post_init__(self) -> None:
        if self.profile not in get_args(Profile):
            raise ConfigurationError(f"profile must be one of {', '.join(get_args(Profile))}, got {self.profile!r}")
        if isinstance(self.heads, str | Path):
            object.__setattr__(self, "_made_for", made_for(Path(self.heads)))
        if self.heads is not None:
            object.__setattr__(self, "heads", read_heads(self.heads))

    def __str__(self) -> str:
        """How Python would build it, but for its heads and what is left at its default."""
        own = [each for each in fields(self) if each.name != "heads"]
        given = [f"{each.name}={getattr(self, each.name)}" for each in own if getattr(self, each.name) != each.default]
        return f"{type(self).__name__}({', '.join(given)})"

    @classmethod
    def every_head(cls: type[_Way], **options: Any) -> _Way:
        """The same in every head of every layer of full attention."""
        return cls(None, **options)

    @property
    def target(self) -> float | None:
        """Share of a query's attention that what is marked gets at least; None where marks say all."""
        return None

    @property
    def unscaled(self) -> int:
        """First tokens of a prompt that are left as they are."""
        return 0

    @abstractmethod
    def marks(self, marked: Bool[Tensor, "b t"], others: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """What is added to the logits of the tokens of a prompt, in fp32.

        Args:
            marked: by the user.
            others: of the same prompts, those that are not; none where nothing is marked.
        """

    def layers(self, shapes: Mapping[int, tuple[int, int]], name: str) -> dict[int, tuple[tuple[int, ...], ...]]:
        """Of every layer that is steered, the query heads of every KV head, counted within its group.

        Args:
            shapes: KV heads, and query heads of each, of the layers that can be steered.
            name: of the model.

        Raises:
            ConfigurationError: when there is no such layer or head, or it cannot be steered.
            MismatchError: when the heads were found in a model of another shape.
        """
        made = getattr(self, "_made_for", None)
        shape = (1 + max(shapes, default=-1), max((heads * group for heads, group in shapes.values()), default=0))
        if made is not None and made[1] != shape:
            told = f"{made[0]}, which has {made[1][0]} layers of {made[1][1]} heads"
            raise MismatchError(f"the heads were found in {told}, and {name} has {shape[0]} of {shape[1]}")
        named: Heads = dict.fromkeys(shapes) if self.heads is None else read_heads(self.heads)
        found = {}
        for index, heads in (named or {0: None}).items():
            if index not in shapes:
                raise ConfigurationError(
                    f"heads of layer {index} are to be steered, and in {name} those of the layers "
                    f"{_listed(sorted(shapes))} can be: of full attention, with a cache that headwise compresses and "
                    "that no other layer reads"
                )
            kv_heads, group = shapes[index]
            if heads is not None and heads[-1] >= kv_heads * group:
                raise ConfigurationError(
                    f"head {heads[-1]} of layer {index} is to be steered, and a layer of {name} has "
                    f"{kv_heads * group} query heads, 0 to {kv_heads * group - 1}"
                )
            own = range(kv_heads * group) if heads is None else heads
            found[index] = tuple(tuple(head % group for head in own if head // group == h) for h in range(kv_heads))
        return found

    def layer(self, heads: tuple[tuple[int, ...], ...], group: int, device: torch.device) -> LayerSteering:
        """How a layer is steered in those heads, as `layers` gives them."""
        gates = torch.zeros(len(heads), group, dtype=torch.float32, device=device)
        for h, own in enumerate(heads):
            gates[h, list(own)] = 1.0
        return LayerSteering(gates, self.target, self.profile == "steered" and self.target is None)


@dataclass(frozen=True)
class Steering(BaseSteering):
    """PASTA: attention to what is not marked is multiplied by alpha, and all is made one again (equation 2).

    Zhang et al., ICLR 2024, arXiv 2311.02262. Tokens that the model generates count like marked ones, as in the
    program of the authors; tokens of a prompt without a mark are left alone.

    Args:
        alpha: above 0 and at most 1, which changes nothing.
        keep_sinks: first tokens that are not scaled; a weaker method, because attention is parked on them.
    """

    alpha: int | float = 0.01
    keep_sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep_sinks, bool) or not isinstance(self.keep_sinks, int) or self.keep_sinks < 0:
            raise ConfigurationError(f"keep_sinks must be a count of 0 or more, got {self.keep_sinks!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha <= 1:
            raise ConfigurationError(f"alpha must be above 0 and at most 1, got {self.alpha!r}")

    @property
    def unscaled(self) -> int:
        """As asked."""
        return self.keep_sinks

    def marks(self, marked: Bool[Tensor, "b t"], others: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """The logarithm of alpha for the others."""
        return others.float() * math.log(self.alpha)


@dataclass(frozen=True)
class Boost(BaseSteering):
    """InstABoost: attention to what is marked is multiplied, and all is made one again (arXiv 2506.13734).

    Args:
        factor: at least 1, which changes nothing.
    """

    factor: int | float = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.factor, int | float) and not isinstance(self.factor, bool)
        if not number or not 1 <= self.factor < math.inf:
            raise ConfigurationError(f"factor must be a number of 1 or more, got {self.factor!r}")

    def marks(self, marked: Bool[Tensor, "b t"], others: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """The logarithm of the factor for what is marked."""
        return marked.float() * math.log(self.factor)


@dataclass(frozen=True)
class TargetShare(BaseSteering):
    """SpotLight: what is marked gets about a share of every query's attention at least (arXiv 2505.12025).

    Where it gets less, the logarithm of what is missing as a factor is added to its logits. That share has to be known
    before, so that attention is computed three times; policies look at the plain one.

    Args:
        share: above 0 and below 1.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.share, float) or not 0 < self.share < 1:
            raise ConfigurationError(f"share must be a number above 0 and below 1, got {self.share!r}")

    @property
    def target(self) -> float | None:
        """As asked."""
        return self.share

    def marks(self, marked: Bool[Tensor, "b t"], others: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """One for what is marked: how much, the gates say."""
        return marked.float()


def _listed(numbers: Sequence[int]) -> str:
    """Numbers in words, runs of them as ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs) or "none"
