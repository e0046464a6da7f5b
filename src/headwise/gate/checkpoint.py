"""Checkpoint: trained gates -> a folder with safetensors and JSON, and back for the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from headwise.gate.gate import Gates, LayerGate
from headwise.policies.base import Policy
from headwise.policies.scored import Repeated
from headwise.weights import Folder

_FOLDER = Folder(Gates, LayerGate, "gates", "gates.safetensors", "headwise-gate-1", "headwise train-gate")
save_gates, load_gates, check_gates = _FOLDER.save, _FOLDER.load, _FOLDER.check


def shipped_gates() -> Path:
    """The folder of those that come with headwise, for its default model."""
    return Path(__file__).parent / "trained"


def gates_of(policy: Policy, model: nn.Module) -> Mapping[int, LayerGate]:
    """The gates that the policy asks for, by layer and where the model is; none where it asks for none.

    Raises:
        InputError: when there are none in the folder.
        MismatchError: when they were trained for another model.
    """
    if not isinstance(policy, Repeated) or policy.gate is False:
        return {}
    gates = load_gates(shipped_gates() if policy.gate is True else Path(policy.gate))
    check_gates(gates, model)
    device = next(model.parameters()).device
    return {index: layer.to(device) for index, layer in gates.layers.items()}
