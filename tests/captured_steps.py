"""Captured steps where there is no GPU: traced instead, and watched for whatever waits for the device."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host has to wait for, or whose shape depends on content.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}


class NeverWaits(TorchDispatchMode):
    """Fails on any operation that makes the host wait for the device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert name not in WAITING, name
        if name in {"index", "index_put", "index_put_"}:
            assert not any(i is not None and i.dtype == torch.bool for i in arguments[1]), f"{name} with a mask"
        return function(*arguments, **(options or {}))


def traced(step):
    """The operations of a step, recorded once; replaying them on the same tensors is what a CUDA graph does."""
    nothing = torch.empty(0)
    recorded = make_fx(lambda _: step())(nothing)
    return lambda: recorded(nothing)
