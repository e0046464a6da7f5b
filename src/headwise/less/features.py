"""Features: queries and keys -> non-negative features whose product stands for the exponential of their logit.

Dong et al., ICML 2024 (arXiv 2402.09398), section 3: one small network per query head for queries, one per KV head for
keys. Here they are in the form that inference needs; what training adds is in `headwise.training.less`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from headwise.types import Float, Tensor
from headwise.weights import LayerWeights, ModelWeights


@dataclass(frozen=True, eq=False)
class LayerFeatures(LayerWeights):
    """The two networks of one layer. `w` is the hidden width, `r` the number of features.

    Attributes:
        query_in, query_out: of the query network.
        key_in, key_out: of the key network.
        key_mix: what the key network ends with, folded into one matrix.
    """

    query_in: Float[Tensor, "h g d w"]
    query_out: Float[Tensor, "h g w r"]
    key_in: Float[Tensor, "h d w"]
    key_out: Float[Tensor, "h w r"]
    key_mix: Float[Tensor, "h r r"]

    @property
    def count(self) -> int:
        """Features of a query or key."""
        return int(self.key_mix.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: torch.device) -> LayerFeatures:
        """The same on another device; copied there once, for all caches."""
        if device == self.key_mix.device:
            return self
        if device not in self._elsewhere:
            moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
            self._elsewhere[device] = LayerFeatures(**moved)
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, LayerFeatures]:
        return {}

    def of_queries(self, query: Float[Tensor, "b h g q d"]) -> Float[Tensor, "b h g q r"]:
        """Features of queries, as attention receives them and not scaled."""
        into, out = self.query_in.flatten(0, 1), self.query_out.flatten(0, 1)
        return two_layers(query.flatten(1, 2), into, out).abs().view(*query.shape[:-1], -1)

    def of_keys(self, keys: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n r"]:
        """Features of keys, as attention receives them."""
        return per_head(two_layers(keys, self.key_in, self.key_out), self.key_mix).abs()


class LessKernels(ModelWeights[LayerFeatures]):
    """The networks of a whole model."""

    def __repr__(self) -> str:
        """By content: the same wherever the files are."""
        return f"<LESS kernels {self.digest}>"

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as they are computed with."""
        return sum(layer.nbytes for layer in self.layers.values())


def two_layers(
    x: Float[Tensor, "b heads n d"], into: Float[Tensor, "heads d w"], out: Float[Tensor, "heads w r"]
) -> Float[Tensor, "b heads n r"]:
    """Linear, GELU, linear, GELU, without biases, each head its own."""
    return functional.gelu(per_head(functional.gelu(per_head(x, into)), out))


def per_head(x: Float[Tensor, "b heads n i"], weight: Float[Tensor, "heads i o"]) -> Float[Tensor, "b heads n o"]:
    """Each head's vectors times its own matrix, in fp32."""
    batch, heads, rows, _ = x.shape
    # One product per head, however many sequences: weights are read once and not copied.
    flat = x.float().transpose(0, 1).reshape(heads, batch * rows, -1)
    return torch.bmm(flat, weight).view(heads, batch, rows, -1).transpose(0, 1)
