"""A step to be captured works on the device alone: there is no GPU here, so everything it has is on the meta device.

What it made on the host, or read there, would be copied while it is captured, which CUDA refuses, or be used where it
cannot be.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import headwise
import tiny
from headwise.kernels.backends import choose
from headwise.kernels.triton import codes as triton_codes
from headwise.kernels.triton import pages as launches
from headwise.policies.words import in_bits
from headwise.stages.capture import begin_capture

META = torch.device("meta")

POLICIES = [
    headwise.Full(),
    headwise.H2O(heavy=5, recent=4),
    headwise.FastGen(0.6),
    in_bits(headwise.H2O(heavy=5, recent=4), "int8"),
    headwise.Match(headwise.SnapKV(keep=9, window=4)),
    headwise.RKV(keep=9),
]


def on_host(*trees):
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor) and leaf.device != META]


class NothingOnTheHost(TorchDispatchMode):
    """Fails on any operation that reads or makes a tensor on the host."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        assert not on_host(arguments, options, result), function
        return result


class Launched:
    """A Triton kernel that only looks where its tensors are."""

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            assert not on_host(arguments, named)

        return launch


def test_a_tensor_on_the_host_is_noticed():
    here, there = torch.ones(2), torch.ones(2, device=META)
    for step in (lambda: there.copy_(here), lambda: torch.ones(2), lambda: here.to(META)):
        with pytest.raises(AssertionError), NothingOnTheHost():
            step()


@pytest.mark.parametrize("capturing", [False, True], ids=["trial", "capture"])
@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_step_to_capture_works_on_the_device_alone(policy, kernel, capturing, monkeypatch):
    code = SimpleNamespace(**dict.fromkeys(("attend", "attend_codes", "combine", "turn", "weigh", "write"), Launched()))
    for module in (launches, triton_codes):
        monkeypatch.setattr(module, "device_code", lambda: code)
    # Nothing is known of autocast there.
    monkeypatch.setattr("headwise.stages.ambient.is_autocast_enabled", lambda kind: False)
    # transformers goes other ways while a step is captured.
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: capturing)
    model, ids = tiny.llama(), tiny.prompt(40, batch=2)
    cache = headwise.HeadwiseCache(model, policy, kernel="reference", tokenizer=tiny.tokenizer())
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    column = torch.full((1,), 40, dtype=torch.int32, device=META)
    for layer in cache.headwise_layers:
        begin_capture(layer.core, column, room=20)
        layer.core.to(META)
        monkeypatch.setitem(vars(layer.core.config.cache), "kernels", choose(kernel, torch.device("cpu")))
    cache.captured = True
    model.to(META)
    new, positions = (torch.full((2, 1), 40, dtype=torch.long, device=META) for _ in range(2))
    with torch.no_grad():
        # Matrices that are made once are not made while a step is captured.
        model(input_ids=new, position_ids=positions, past_key_values=cache)
        with NothingOnTheHost():
            logits = model(input_ids=new, position_ids=positions, past_key_values=cache).logits
    assert logits.device == META and logits.shape == (2, 1, tiny.VOCABULARY)
