"""Units: tensors, a device or words -> bytes and seconds, and bytes as people read them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**k for k, p in enumerate("kMGT", 1)}}
_UNITS |= {f"{p}iB": 1024**k for k, p in enumerate("KMGT", 1)}


def clock(device: torch.device) -> float:
    """Seconds, when everything asked of the device is done."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors; a storage that several tensors share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def parse_bytes(text: str) -> int:
    """A number of bytes with its unit, such as "1.5GB" (thousands) or "64MiB" (1,024s).

    Raises:
        ConfigurationError: when it is not one.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise ConfigurationError(f"a budget in bytes is a number and a unit, such as 64MiB or 1.5GB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def format_bytes(count: int) -> str:
    """A number of bytes for people, in binary units."""
    size, sign = float(abs(count)), "-" if count < 0 else ""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{sign}{size:.0f} {unit}" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= 1024
    return f"{sign}{size:.2f} GiB"
