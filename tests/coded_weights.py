"""Coded weights: a model -> the same with linear layers whose parameters are tensors of codes."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map_only


class Int8Tensor(torch.Tensor):
    """Numbers to look at, and codes of 8 bits with a step for each row to hold."""

    @staticmethod
    def __new__(cls, codes, steps):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=steps.dtype)

    def __init__(self, codes, steps):
        self.codes, self.steps = codes, steps

    @classmethod
    def of(cls, numbers):
        steps = numbers.abs().amax(dim=1, keepdim=True) / 127
        return cls((numbers / steps).round().to(torch.int8), steps)

    def dequantize(self):
        return self.codes.to(self.steps.dtype) * self.steps

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].steps)
        return function(*tree_map_only(cls, cls.dequantize, args), **tree_map_only(cls, cls.dequantize, kwargs or {}))


def with_int8_weights(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(Int8Tensor.of(module.weight.detach()), requires_grad=False)
    return model
