"""Checkpoint: trained gates -> a folder with safetensors and JSON, and back for the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from headwise.gate.gate import Gates, LayerGate
from headwise.policies.base import Policy
from headwise.policies.scored import Repeated
from headwise.trained import Folder, Origin

_FOLDER = Folder("gates", "gates.safetensors", "headwise-gate-1", "headwise train-gate")


def shipped_gates() -> Path:
    """The folder of those that come with headwise, for its default model."""
    return Path(__file__).parent / "trained"


def save_gates(gates: Gates, folder: Path) -> None:
    """Write them, the weights in half precision.

    Raises:
        InputError: when the folder cannot be written.
    """
    _FOLDER.save(folder, {index: layer.tensors() for index, layer in gates.layers.items()}, _origin(gates))


def load_gates(folder: Path) -> Gates:
    """What `save_gates` wrote.

    Raises:
        InputError: when the folder holds no such files, or they cannot be read.
    """
    layers, origin = _FOLDER.load(folder)
    try:
        whole = {index: LayerGate(**tensors) for index, tensors in layers.items()}
    except TypeError as error:
        raise _FOLDER.unreadable(folder, error) from error
    return Gates(whole, origin.about, origin.sample, origin.name)


def check_gates(gates: Gates, model: nn.Module) -> None:
    """Refuse gates that were trained for another model.

    Raises:
        MismatchError: saying which parameter is not the same, or how far they differ.
    """
    _FOLDER.check(_origin(gates), model)


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


def _origin(gates: Gates) -> Origin:
    return Origin(gates.about, gates.sample, gates.name)
