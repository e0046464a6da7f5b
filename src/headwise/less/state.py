"""State: rows that a head lets go of -> a state of constant size, and every later query's read from it.

Dong et al., ICML 2024 (arXiv 2402.09398), section 3.1: the state is a sum of outer products, so the order in which rows
come in does not matter, and nothing of it ever fades.
"""

from __future__ import annotations

import torch

from headwise.less.features import LayerFeatures
from headwise.types import Bool, Float, Int, Tensor

# Rows whose features are computed at a time.
_BLOCK = 1024


class EvictedState:
    """What one layer remembers of evicted rows. There is nothing until the first is folded in.

    Args:
        features: of the layer; None for a layer that forgets, as it does without LESS.

    Attributes:
        sums: features times values, summed over the folded rows, in fp32; None before the first.
        mass: the features alone, summed likewise.
    """

    def __init__(self, features: LayerFeatures | None) -> None:
        self.features = features
        self.reset()

    @property
    def remembers(self) -> bool:
        """Whether it takes anything in."""
        return self.features is not None

    def reset(self) -> None:
        """Forget everything."""
        self.sums: Float[Tensor, "b h r e"] | None = None
        self.mass: Float[Tensor, "b h r"] | None = None

    def allocate(self, heads: torch.Size, value_dim: int, device: torch.device) -> None:
        """Make the state, with nothing in it, unless there is one or none is wanted.

        Args:
            heads: sequences, and KV heads.
        """
        if self.sums is None and self.features is not None:
            # Another layer than the last may be on another device.
            self.features = self.features.to(device)
            count = self.features.count
            self.sums = torch.zeros(*heads, count, value_dim, dtype=torch.float32, device=device)
            self.mass = torch.zeros(*heads, count, dtype=torch.float32, device=device)

    def fold(
        self, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n e"], dropped: Bool[Tensor, "b h n"]
    ) -> None:
        """Add the rows named by `dropped`; each must come once."""
        if self.features is None or not bool(dropped.any()):
            return
        self.allocate(keys.shape[:2], values.shape[-1], keys.device)
        assert self.sums is not None and self.mass is not None
        for start in range(0, keys.shape[2], _BLOCK):
            rows = slice(start, start + _BLOCK)
            gone = dropped[:, :, rows, None]
            # What is not named is undefined, and 0 times a value that is NaN would still be NaN.
            features = self.features.of_keys(keys[:, :, rows]).masked_fill(~gone, 0)
            self.sums += features.transpose(-1, -2) @ values[:, :, rows].float().masked_fill(~gone, 0)
            self.mass += features.sum(dim=2)

    def merge(
        self,
        query: Float[Tensor, "b h g q d"],
        output: Float[Tensor, "b h g q e"],
        lse: Float[Tensor, "b h g q"],
    ) -> Float[Tensor, "b h g q e"]:
        """Attention over the kept rows and the state in one softmax.

        Args:
            output: of attention over the kept rows alone.
            lse: logarithm of its softmax's denominator.
        """
        if self.features is None or self.sums is None or self.mass is None:
            return output
        features = self.features.of_queries(query)
        mass = torch.einsum("bhgqr,bhr->bhgq", features, self.mass)
        sums = torch.einsum("bhgqr,bhre->bhgqe", features, self.sums)
        return blend(output.float(), lse, sums, mass).to(output.dtype)

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order."""
        if self.sums is not None and self.mass is not None:
            indices = indices.to(self.sums.device)
            self.sums, self.mass = self.sums[indices], self.mass[indices]

    def to(self, device: torch.device) -> None:
        """Move the state to another device; the features stay, they are shared by all caches."""
        if self.sums is not None and self.mass is not None:
            self.sums, self.mass = self.sums.to(device), self.mass.to(device)

    def state(self) -> dict[str, Tensor]:
        """The state by name; empty where there is none."""
        if self.sums is None or self.mass is None:
            return {}
        return {"less_sums": self.sums, "less_mass": self.mass}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        if "less_sums" in state:
            self.sums, self.mass = state["less_sums"], state["less_mass"]
            self.features = None if self.features is None else self.features.to(self.sums.device)


def blend(
    output: Float[Tensor, "*rows e"],
    lse: Float[Tensor, "*rows"],
    sums: Float[Tensor, "*rows e"],
    mass: Float[Tensor, "*rows"],
) -> Float[Tensor, "*rows e"]:
    """Attention over kept rows, and values weighted by features -> both in one softmax.

    The definition divides sums of exponentials (equation 4). This is the same, written as a mean of two averages with
    the sigmoid of the difference of their logarithms as weight: it cannot overflow and needs no smallest number.

    Args:
        output, lse: attention over the kept rows, and the logarithm of its denominator.
        sums, mass: of the values with their weights, and of the weights, which are not negative.
    """
    something = mass > 0
    mass = mass.where(something, 1)
    weight = (mass.log() - lse).sigmoid() * something
    return output.lerp(sums / mass[..., None], weight[..., None])
