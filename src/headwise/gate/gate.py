"""Gate: what a layer has at hand of each token -> the attention it would get, were the prompt repeated.

After KVzap (Jegou and Jeblick, arXiv 2601.07891) and Fast KVzip (arXiv 2601.17668), which predict the scores of KVzip
from hidden states. Here keys are enough, so that nothing has to be kept for it and a prompt may come in parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from headwise.gate.inputs import gate_inputs
from headwise.trained import digest_of
from headwise.types import Float, Int, Tensor

if TYPE_CHECKING:
    from headwise.policies.scored import Rotation


@dataclass(frozen=True, eq=False)
class LayerGate:
    """The network of one layer: c inputs, w hidden units, one number per KV head; all in fp32.

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

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

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


@dataclass(frozen=True, eq=False)
class Gates:
    """The networks of a whole model.

    Attributes:
        layers: by index of the layer; only layers that can be compressed have any.
        about: what they were trained with, and for which model; plain JSON values.
        sample: a few numbers of every parameter of that model, by name, to know it again.
        name: for messages.
    """

    layers: Mapping[int, LayerGate]
    about: Mapping[str, Any]
    sample: Mapping[str, Tensor]
    name: str = "gates"

    def __repr__(self) -> str:
        """By content: the same wherever the files are."""
        return f"<gates {self.digest}>"

    @cached_property
    def digest(self) -> str:
        """Hash of the weights."""
        return digest_of({index: layer.tensors() for index, layer in self.layers.items()})
