"""Placement: a module, however its weights are kept -> the device that it computes on, and the numbers of its weights.

Where accelerate has offloaded weights to main memory or to a disk, tensors without content take their place, and a hook
on each module knows where its weights are and where they are needed. Hooks are looked at; nothing is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from headwise.errors import UnsupportedModelError
from headwise.types import Tensor


def device_of(module: nn.Module) -> torch.device:
    """Where it computes; "meta" where there is nothing to compute with."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    places = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    return next((torch.device(place) for place in places if place is not None), device)


def parameters_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its content, in the order of names; what is tied is named once.

    Raises:
        UnsupportedModelError: where there is none.
    """
    # Without content, weights that are tied are no longer the same.
    tied = getattr(model, "all_tied_weights_keys", ())
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_meta:
            yield name, _numbers(parameter)
        elif name not in tied:
            yield name, _numbers(_fetched(model, name))


def packed_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is saved of it beside parameters: buffers, where some ways to quantize keep weights, and packed weights."""
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                yield name, _numbers(_fetched(model, name) if part.is_meta else part)


def _numbers(weight: Tensor) -> Tensor:
    """Without history; of codes, what they stand for."""
    coded = weight.is_quantized or type(weight).dequantize is not Tensor.dequantize
    return (weight.dequantize() if coded else weight).detach()


def _fetched(model: nn.Module, name: str) -> Tensor:
    owner, _, own = name.rpartition(".")
    for hook in _hooks(model.get_submodule(owner)):
        away = getattr(hook, "weights_map", None)
        if away is not None:
            found: Tensor = away[own]
            return found
    raise UnsupportedModelError(
        f"{name} has no content: it is on the meta device, and no hook of accelerate says where it was offloaded to; "
        "load the weights of the model first"
    )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Of accelerate; several may be chained."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))
