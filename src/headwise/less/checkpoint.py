"""Checkpoint: trained kernels -> a folder with safetensors and JSON, and back for the same model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from headwise.less.kernels import LayerKernels, LessKernels
from headwise.trained import Folder, Origin, sample_weights

_FOLDER = Folder("kernels of LESS", "kernels.safetensors", "headwise-less-1", "headwise train-less")


def shipped_kernels() -> Path:
    """The folder of those that come with headwise, for its default model."""
    return Path(__file__).parent / "trained"


def save_kernels(kernels: LessKernels, folder: Path) -> None:
    """Write them, the weights in half precision.

    Raises:
        InputError: when the folder cannot be written.
    """
    layers = {index: layer.tensors() for index, layer in kernels.layers.items()}
    _FOLDER.save(folder, layers, _origin(kernels))


def load_kernels(folder: Path) -> LessKernels:
    """What `save_kernels` wrote.

    Raises:
        InputError: when the folder holds no such files, or they cannot be read.
    """
    layers, origin = _FOLDER.load(folder)
    try:
        whole = {index: LayerKernels(**tensors) for index, tensors in layers.items()}
    except TypeError as error:
        raise _FOLDER.unreadable(folder, error) from error
    return LessKernels(whole, origin.about, origin.sample, origin.name)


def check_kernels(kernels: LessKernels, model: nn.Module) -> None:
    """Refuse kernels that were trained for another model.

    Raises:
        MismatchError: saying which parameter is not the same, or how far they differ.
    """
    _FOLDER.check(_origin(kernels), model)


def _origin(kernels: LessKernels) -> Origin:
    return Origin(kernels.about, kernels.sample, kernels.name)


__all__ = ["check_kernels", "load_kernels", "sample_weights", "save_kernels", "shipped_kernels"]
