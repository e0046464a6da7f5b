"""Checkpoint: trained kernels -> a folder with safetensors and JSON, and back for the same model."""

from __future__ import annotations

from pathlib import Path

from headwise.less.features import LayerFeatures, LessKernels
from headwise.weights import WeightsFolder

_FOLDER = WeightsFolder(
    LessKernels, LayerFeatures, "kernels of LESS", "kernels.safetensors", "headwise-less-1", "headwise train-less"
)
save_kernels, load_kernels, check_kernels = _FOLDER.save, _FOLDER.load, _FOLDER.check


def shipped_kernels() -> Path:
    """The folder of those that come with headwise, for its default model."""
    return Path(__file__).parent / "trained"
