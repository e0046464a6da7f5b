"""Gate: what a layer has at hand of each token -> the attention it would get, were the prompt repeated.

After KVzap (Jegou and Jeblick, arXiv 2601.07891) and Fast KVzip (arXiv 2601.17668), which predict the scores of KVzip
from hidden states. Here keys are enough, so that nothing has to be kept for it and a prompt may come in parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from headwise.gate.inputs import gate_inputs
from headwise.types import Float, Int, Rotation, Tensor
from headwise.weights import LayerWeights, ModelWeights


@dataclass(frozen=True, eq=False)
class LayerGate(LayerWeights):
    """The network of one layer: c inputs, w hidden units, one number per KV head.

    Attributes:
        mean, scale: of the inputs, which are brought to about 1 by them.
        into, bias: of the hidden units.
        out, level: of the logarithms of the scores.
    """

    mean: Float[Tensor, " c"]
    scale: Float[Tensor, " c"]
    into: Float[Tensor, "c w"]
    bias: Float[Tensor, " w"]
    out: Float[Tensor, "w h"]
    level: Float[Tensor, " h"]

    def to(self, device: torch.device) -> LayerGate:
        """The same on that device."""
        return LayerGate(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def predict(self, inputs: Float[Tensor, "*n c"]) -> Float[Tensor, "*n h"]:
        """Logarithms of the scores."""
        hidden = (inputs.float() - self.mean) / self.scale @ self.into + self.bias
        return functional.gelu(hidden) @ self.out + self.level

    def scores(
        self,
        keys: Float[Tensor, "b h t d"],
        positions: Int[Tensor, "b t"],
        length: Int[Tensor, "b 1 1"],
        rotation: Rotation | None,
    ) -> Float[Tensor, "b h t"]:
        """The largest attention that each token of a prompt is expected to get, from 0 to 1.

        Args:
            as for `gate_inputs`.
        """
        found = self.predict(gate_inputs(keys, positions, length, rotation))
        return found.clamp(max=0).exp().transpose(1, 2)


class Gates(ModelWeights[LayerGate]):
    """The networks of a whole model."""

    def __repr__(self) -> str:
        """By content: the same wherever the files are."""
        return f"<gates {self.digest}>"
