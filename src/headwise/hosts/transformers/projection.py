"""Projection: a model -> the matrix that each attention layer multiplies its heads' outputs with."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from headwise.types import Float, Tensor

# What transformers' families call it.
_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")


def output_projections(model: PreTrainedModel) -> dict[int, Float[Tensor, "hidden inner"]]:
    """By layer; layers whose projection is not known are left out."""
    found: dict[int, Tensor] = {}
    for module in model.get_decoder().modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            continue
        for name in _NAMES:
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Linear | Conv1D):
                weight = projection.weight.detach()
                found[index] = weight.T if isinstance(projection, Conv1D) else weight
    return found
