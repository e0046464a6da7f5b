"""Checkpoint: trained kernels -> a folder with safetensors and JSON, and back for the same model.

A model is known by a few numbers of each of its parameters. They may differ as far as precision and quantization make
them: another model is refused, the same one in 16 or 4 bits is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from headwise.errors import InputError, MismatchError
from headwise.less.kernels import LayerKernels, LessKernels
from headwise.types import Float, Tensor

_FORMAT = "headwise-less-1"

_CONFIG, _WEIGHTS = "config.json", "kernels.safetensors"

# Of every parameter of the model.
_SAMPLED = 16

# How far those numbers may be off, relative to their size. 4-bit weights are off by 0.1, other trainings by about 1.
_TOLERANCE = 0.25


def shipped_kernels() -> Path:
    """The folder of those that come with headwise, for its default model."""
    return Path(__file__).parent / "trained"


def sample_weights(model: nn.Module) -> dict[str, Float[Tensor, " n"]]:
    """A few numbers of every parameter, by name."""
    sample = {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, len(flat) // _SAMPLED)
        sample[name] = flat[::step][:_SAMPLED].float().cpu().clone()
    return sample


def save_kernels(kernels: LessKernels, folder: Path) -> None:
    """Write them, the weights in half precision.

    Raises:
        InputError: when the folder cannot be written.
    """
    tensors = {f"model.{name}": numbers for name, numbers in kernels.sample.items()}
    for index, layer in kernels.layers.items():
        tensors |= {f"layers.{index}.{name}": t.half().cpu().contiguous() for name, t in layer.tensors().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / _WEIGHTS, {"format": _FORMAT})
        (folder / _CONFIG).write_text(json.dumps(dict(kernels.about), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r}: {error}") from error


def load_kernels(folder: Path) -> LessKernels:
    """What `save_kernels` wrote.

    Raises:
        InputError: when the folder holds no such files, or they cannot be read.
    """
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(
                f"no kernels of LESS in {str(folder)!r}: it has no {name}; `headwise train-less` makes one"
            )
    layers: dict[int, dict[str, Tensor]] = {}
    sample: dict[str, Tensor] = {}
    try:
        about: Any = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise ValueError(f"{_CONFIG} holds {type(about).__name__}, not an object")
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise InputError(f"{str(folder)!r} was not written by this version of headwise ({_FORMAT})")
            for name in file.keys():  # noqa: SIM118  # not a dict
                owner, _, rest = name.partition(".")
                if owner == "model":
                    sample[rest] = file.get_tensor(name)
                else:
                    index, _, field = rest.partition(".")
                    layers.setdefault(int(index), {})[field] = file.get_tensor(name).float()
        whole = {index: LayerKernels(**tensors) for index, tensors in sorted(layers.items())}
    except (SafetensorError, ValueError, TypeError) as error:
        raise InputError(f"the kernels of LESS in {str(folder)!r} cannot be read: {error}") from error
    return LessKernels(whole, about, sample, str(folder))


def check_kernels(kernels: LessKernels, model: nn.Module) -> None:
    """Refuse kernels that were trained for another model.

    Raises:
        MismatchError: saying which parameter is not the same, or how far they differ.
    """
    ours = sample_weights(model)
    trained_for = (
        f"the kernels of LESS in {kernels.name!r} were trained for {kernels.about.get('model', 'another model')}"
    )
    remedy = "train some for this model with `headwise train-less`"
    differing = sorted(
        name
        for name in ours.keys() | kernels.sample.keys()
        if name not in ours or name not in kernels.sample or ours[name].shape != kernels.sample[name].shape
    )
    if differing:
        raise MismatchError(f"{trained_for}; this one differs in {differing[0]!r}; {remedy}")
    # What is the same all over, as fresh norms and biases are, is so in many models.
    telling = {name: sample for name, sample in kernels.sample.items() if sample.min() < sample.max()}
    off = torch.tensor([float((ours[name] - sample).norm() / sample.norm()) for name, sample in telling.items()])
    if not float(off.median()) <= _TOLERANCE:
        raise MismatchError(f"{trained_for}; the weights of this one differ by {float(off.median()):.0%}; {remedy}")
