"""Kernels: a name and a device -> the functions that read and write pages, or why they cannot run there.

`reference` defines them in plain torch; `cpu` (compiled) and `triton` have its signatures and are tested against it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headwise.errors import ConfigurationError
from headwise.types import Decoded, Tensor

AUTO = "auto"

# Where several can run on a device, "auto" takes the first.
REFERENCE = "reference"
NAMES = ("cpu", "triton", REFERENCE)

_HOMES = {
    "cpu": "headwise.kernels.cpu.calls",
    "triton": "headwise.kernels.triton.pages",
    REFERENCE: "headwise.kernels.reference",
}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernels:
    """One implementation of what `headwise.kernels.reference` defines, function by function."""

    name: str
    ragged_decode: Callable[..., Decoded]
    append: Callable[..., None]
    column_mass: Callable[..., tuple[Tensor, Tensor]]
    attention_and_peaks: Callable[..., tuple[Tensor, Tensor]]


def obstacle(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why those kernels cannot run on that device, for rows of that type; None where they can."""
    if name != REFERENCE and dtype not in _DTYPES:
        return f"they take {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}, not {dtype}"
    try:
        reason: str | None = _module(name).obstacle(device)
    except ImportError as error:
        return str(error)
    return reason


def choose(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Kernels:
    """The kernels of that name; "auto" takes the fastest that run on the device, for rows of that type.

    Raises:
        ConfigurationError: for an unknown name, or kernels that cannot run there; never takes others instead.
    """
    if name == AUTO:
        name = next(other for other in NAMES if obstacle(other, device, dtype) is None)
    check_name(name)
    reason = obstacle(name, device, dtype)
    if reason is not None:
        raise ConfigurationError(f"the {name!r} kernels cannot run on {device}: {reason}")
    module = _module(name)
    return Kernels(name, module.ragged_decode, module.append, module.column_mass, module.attention_and_peaks)


def check_name(name: str) -> None:
    """Refuse a name that no kernels have.

    Raises:
        ConfigurationError: with the names there are.
    """
    if name not in (AUTO, *NAMES):
        raise ConfigurationError(f"unknown kernel {name!r}; available: {', '.join((AUTO, *NAMES))}")


def _module(name: str) -> Any:
    return importlib.import_module(_HOMES[name])
