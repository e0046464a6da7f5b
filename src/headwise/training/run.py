"""Run: a folder and what a training is about -> a run that can be gone on with, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from headwise.errors import ConfigurationError
from headwise.files import whole_file, write_text
from headwise.types import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Called with what is being done, how much of it is done, and how much there is.
Tell = Callable[[str, int, int], None]

_STATE = "run.json"


def model_name(model: PreTrainedModel) -> str:
    """A Hub id as it is, and of a folder only its own name."""
    name = str(model.config.name_or_path or type(model).__name__)
    return Path(name).name if Path(name).is_dir() else name


def begin_run(work: Path, about: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder of a run, or see that what lies there is the same run.

    Raises:
        ConfigurationError: when it holds another run, or one that is not to be gone on with.
    """
    state, path = json.dumps(about, indent=2), work / _STATE
    if path.is_file():
        if not resume:
            raise ConfigurationError(f"{str(work)!r} holds an unfinished run: --resume it, or remove it")
        if path.read_text(encoding="utf-8") != state:
            raise ConfigurationError(f"{str(work)!r} holds a run with other options; remove it, or use those")
    work.mkdir(parents=True, exist_ok=True)
    write_text(path, state)


def layer_file(work: Path, index: int) -> Path:
    """Where a layer lies that is finished."""
    return work / f"layer-{index:03d}.safetensors"


def save_layer(path: Path, weights: Mapping[str, Tensor], figures: Mapping[str, float]) -> None:
    """Write a finished layer with what was found out about it; the file is whole or not there."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with whole_file(path) as scratch:
        save_file(tensors | {name: torch.tensor(value) for name, value in figures.items()}, scratch)


def load_layer(path: Path, figures: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What `save_layer` wrote: the weights, and the figures of those names."""
    tensors = load_file(path)
    found = {name: float(tensors.pop(name)) for name in figures}
    return tensors, found
