"""Captured steps where there is no GPU: traced instead, and watched for whatever waits for the device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

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


class Recorder(TorchDispatchMode):
    """Writes down the operations that run while it is on."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.operations.append((function, arguments, options or {}, result))
        return result


def traced(step):
    """The operations of a step, recorded once; replaying them on the same tensors is what a CUDA graph does.

    Numbers that the host read are as they were; a tensor that an operation made is what it makes this time.
    """
    with Recorder() as recorder:
        recorded = step()

    def replay():
        made = {}
        for function, arguments, options, result in recorder.operations:
            given = tree_map_only(torch.Tensor, lambda tensor: made.get(id(tensor), tensor), (arguments, options))
            again = function(*given[0], **given[1])
            for before, now in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(before, torch.Tensor):
                    made[id(before)] = now
        return made[id(recorded)]

    return replay
