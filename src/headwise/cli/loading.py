"""Loading: a model's name, a dtype and a device as words -> the model and its tokenizer, quietly."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from headwise.errors import ConfigurationError, or_nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for "auto".

    Raises:
        ConfigurationError: for another name.
    """
    import torch

    if name not in _DTYPES:
        raise ConfigurationError(f"unknown dtype {name!r}; one of {', '.join(_DTYPES)}" + or_nearest(name, _DTYPES))
    dtype: torch.dtype | None = None if name == "auto" else getattr(torch, name)
    return dtype


def check_kernel(name: str) -> None:
    """Refuse a name that no kernels have, before anything is loaded.

    Raises:
        ConfigurationError: with the names there are.
    """
    from headwise.kernels.backends import check_name

    check_name(name)


def parse_device(name: str | None) -> torch.device | None:
    """The device of that name; None for the default.

    Raises:
        ConfigurationError: when this machine does not have it.
    """
    import torch

    if name is None:
        return None
    here = device_names()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f"unknown device {name!r}; this machine has: {', '.join(here)}") from None
    if device.type not in here or (device.index and f"{device.type}:{device.index}" not in here):
        raise ConfigurationError(f"there is no device {name!r}; this machine has: {', '.join(here)}")
    return device


def device_names() -> list[str]:
    """The devices of this machine: "cpu", and of an accelerator its kind and every single one."""
    import torch

    names = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        names += [accelerator.type, *(f"{accelerator.type}:{index}" for index in range(count))]
    return names


def load(
    name: str | None, dtype: torch.dtype | None, device: torch.device | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, without the loader's progress bars and advice.

    Raises:
        ModelNotFoundError: when it cannot be found or read.
    """
    from headwise.hosts.transformers.models import load_default_model, load_model

    quieten_loader()
    if sys.stderr.isatty():
        typer.secho(f"loading {name or 'the default model'} ...", dim=True, err=True)
    return load_default_model(dtype, device) if name is None else load_model(name, dtype, device)


def quieten_loader() -> None:
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
