"""Weights: what was trained for a model's layers -> a folder with safetensors and JSON, and back; a model's identity.

A model is known by a few numbers of each of its parameters. They may differ as far as precision and quantization make
them: another model is refused, the same one in 16 or 4 bits is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from headwise.errors import InputError, MismatchError
from headwise.files import whole_file, write_text
from headwise.placement import packed_of, parameters_of
from headwise.types import Float, Tensor

CONFIG = "config.json"

# Of every parameter of the model: enough numbers to tell two trainings of one architecture apart.
_SAMPLED = 16

# How far those numbers may be off, relative to their size. 4-bit weights are off by 0.1, other trainings by about 1.
_TOLERANCE = 0.25


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The weights of one layer; subclasses have a field for each, all in fp32."""

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


Layer = TypeVar("Layer", bound=LayerWeights)


@dataclass(frozen=True, eq=False)
class ModelWeights(Generic[Layer]):
    """The weights of a whole model.

    Attributes:
        layers: by index of the layer; only layers that can be compressed have any.
        about: what they were trained with, and for which model; plain JSON values.
        sample: a few numbers of every parameter of that model, by name, to know it again.
        name: for messages and reports; the folder they were read from.
    """

    layers: Mapping[int, Layer]
    about: Mapping[str, Any]
    sample: Mapping[str, Tensor]
    name: str = "just trained"

    @cached_property
    def digest(self) -> str:
        """Hash of the weights."""
        digest = hashlib.sha256()
        for index, layer in sorted(self.layers.items()):
            for name, tensor in layer.tensors().items():
                digest.update(f"{index} {name} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


Whole = TypeVar("Whole", bound=ModelWeights[Any])


@dataclass(frozen=True)
class WeightsFolder(Generic[Whole]):
    """One kind of trained weights, and how its folders look.

    Attributes:
        whole: of a model.
        layer: of one of its layers.
        what: what they are called, as several.
        file: name of the file with the weights.
        marker: what that file says it is.
        command: what makes such a folder.
    """

    whole: type[Whole]
    layer: type[LayerWeights]
    what: str
    file: str
    marker: str
    command: str

    def save(self, weights: Whole, folder: Path) -> None:
        """Write them, in half precision.

        Raises:
            InputError: when the folder cannot be written.
        """
        tensors = {f"model.{name}": numbers for name, numbers in weights.sample.items()}
        for index, layer in weights.layers.items():
            tensors |= {f"layers.{index}.{name}": t.half().cpu().contiguous() for name, t in layer.tensors().items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / self.file) as scratch:
                save_file(tensors, scratch, {"format": self.marker})
            write_text(folder / CONFIG, json.dumps(dict(weights.about), indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write to {str(folder)!r}: {error}") from error

    def load(self, folder: Path) -> Whole:
        """What `save` wrote, in fp32.

        Raises:
            InputError: when the folder holds no such files, or they cannot be read.
        """
        for name in (CONFIG, self.file):
            if not (folder / name).is_file():
                raise InputError(f"no {self.what} in {str(folder)!r}: it has no {name}; `{self.command}` makes one")
        layers: dict[int, dict[str, Tensor]] = {}
        sample: dict[str, Tensor] = {}
        try:
            about: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if not isinstance(about, dict):
                raise ValueError(f"{CONFIG} holds {type(about).__name__}, not an object")
            with safe_open(folder / self.file, framework="pt") as file:
                if (file.metadata() or {}).get("format") != self.marker:
                    raise InputError(f"{str(folder)!r} was not written by this version of headwise ({self.marker})")
                for name in file.keys():  # noqa: SIM118  # not a dict
                    owner, _, rest = name.partition(".")
                    if owner == "model":
                        sample[rest] = file.get_tensor(name)
                    else:
                        index, _, field = rest.partition(".")
                        layers.setdefault(int(index), {})[field] = file.get_tensor(name).float()
            whole = {index: self.layer(**weights) for index, weights in sorted(layers.items())}
        except (SafetensorError, ValueError, TypeError) as error:
            raise InputError(f"the {self.what} in {str(folder)!r} cannot be read: {error}") from error
        return self.whole(whole, about, sample, str(folder))

    def check(self, weights: Whole, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Refuse what was trained for another model.

        Args:
            model: or what `sampled` gives of its parameters, by name.

        Raises:
            MismatchError: saying which parameter is not the same, or how far they differ.
        """
        ours, theirs = sample_weights(model) if isinstance(model, nn.Module) else model, weights.sample
        trained_for = (
            f"the {self.what} in {weights.name!r} were trained for {weights.about.get('model', 'another model')}"
        )
        remedy = f"train some for this model with `{self.command}`"
        differing = sorted(
            name
            for name in ours.keys() | theirs.keys()
            if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
        )
        if differing:
            raise MismatchError(f"{trained_for}; this one differs in {differing[0]!r}; {remedy}")
        # What is the same all over, as fresh norms and biases are, is so in many models.
        telling = {name: sample for name, sample in theirs.items() if sample.min() < sample.max()}
        each = [float((ours[name] - sample).norm() / sample.norm()) for name, sample in telling.items()]
        off = float(torch.tensor(each, dtype=torch.float64, device="cpu").median())
        if not off <= _TOLERANCE:
            raise MismatchError(f"{trained_for}; the weights of this one differ by {off:.0%}; {remedy}")


def sample_weights(model: nn.Module) -> dict[str, Float[Tensor, " n"]]:
    """A few numbers of every parameter, by name: what a model is known by where it may have been rounded."""
    samples = ((name, sampled(parameter)) for name, parameter in parameters_of(model))
    return {name: sample.float().cpu().clone() for name, sample in samples}


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's shapes and of a few numbers of all its weights; the same on every device."""
    digest = hashlib.sha256()
    for name, parameter in chain(parameters_of(model), packed_of(model)):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sampled(parameter).double().cpu().numpy().tobytes())
    return digest.hexdigest()


def sampled(parameter: Tensor) -> Float[Tensor, " n"]:
    """A few of its numbers."""
    flat = parameter.flatten()
    return flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED]
