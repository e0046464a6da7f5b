"""Checkpoint: trained gates -> a folder with safetensors and JSON, and back for the same model."""

from __future__ import annotations

from pathlib import Path

from headwise.gate.gate import Gates, LayerGate
from headwise.weights import WeightsFolder

_FOLDER = WeightsFolder(Gates, LayerGate, "gates", "gates.safetensors", "headwise-gate-1", "headwise train-gate")
save_gates, load_gates, check_gates = _FOLDER.save, _FOLDER.load, _FOLDER.check


def shipped_gates() -> Path:
    """The folder of those that come with headwise, for its default model."""
    return Path(__file__).parent / "trained"
