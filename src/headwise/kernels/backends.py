"""Back ends: a name and a device -> the kernels that run there, or why they cannot.

`reference` defines them in plain torch; `cpu` (compiled) and `triton` are tested against it. A new back end is a folder
with a `KERNELS`, and a line here.
"""

from __future__ import annotations

import importlib

import torch

from headwise.errors import ConfigurationError, or_nearest
from headwise.kernels.interface import DTYPES, Kernels
from headwise.quant.formats import Precision

AUTO = "auto"
REFERENCE = "reference"

# Where several can run, "auto" takes the first: what comes after `reference`, which always can, only when asked for by
# name. They are imported when they are asked for.
_HOMES = {
    "cpu": "headwise.kernels.cpu.backend",
    "triton": "headwise.kernels.triton.backend",
    REFERENCE: "headwise.kernels.reference",
}
NAMES = tuple(_HOMES)


def obstacle(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, precision: Precision | None = None
) -> str | None:
    """Why those kernels cannot run on that device, for rows of that type and in those formats; None where they can."""
    if name != REFERENCE and dtype not in DTYPES:
        return f"they take {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not {dtype}"
    try:
        kernels = _kernels(name)
        reason = kernels.obstacle(device)
    except ImportError as error:
        return str(error)
    if reason is not None:
        return reason
    readable = kernels.code_bits
    if precision is not None and readable is not None and not precision.bits <= readable:
        can, cannot = (" or ".join(map(str, sorted(bits))) for bits in (readable, precision.bits - readable))
        return f"they read codes of {can} bits, not of {cannot}"
    return None


def choose(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, precision: Precision | None = None
) -> Kernels:
    """The kernels of that name; "auto" takes the first that can run there.

    Args:
        dtype: of rows.
        precision: formats of rows that are codes; None where all are numbers.

    Raises:
        ConfigurationError: for an unknown name, or kernels that cannot run there; never takes others instead.
    """
    if name == AUTO:
        name = next(other for other in NAMES if obstacle(other, device, dtype, precision) is None)
    check_name(name)
    reason = obstacle(name, device, dtype, precision)
    if reason is not None:
        raise ConfigurationError(f"the {name!r} kernels cannot run on {device}: {reason}")
    return _kernels(name)


def instructions(device: torch.device) -> str | None:
    """Name of the vector instructions that "auto" would use there; None where its kernels are built once."""
    named = choose(AUTO, device).instructions
    return None if named is None else named()


def check_name(name: str) -> None:
    """Refuse a name that no kernels have.

    Raises:
        ConfigurationError: with the names there are.
    """
    if name not in (AUTO, *NAMES):
        raise ConfigurationError(
            f"unknown kernel {name!r}; available: {', '.join((AUTO, *NAMES))}" + or_nearest(name, (AUTO, *NAMES))
        )


def _kernels(name: str) -> Kernels:
    found: Kernels = importlib.import_module(_HOMES[name]).KERNELS
    return found
