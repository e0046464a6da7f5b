"""Back end: the compiled kernels by name, and why they cannot run where they cannot."""

from __future__ import annotations

import torch

from headwise.kernels.cpu import library
from headwise.kernels.cpu.calls import append, ragged_decode
from headwise.kernels.cpu.map import attention, attention_and_mass, attention_and_peaks, column_mass
from headwise.kernels.cpu.structs import CODE_BITS
from headwise.kernels.interface import Kernels


def obstacle(device: torch.device) -> str | None:
    """Why these kernels cannot run on that device; None where they can."""
    if device.type != "cpu":
        return "they are for the CPU"
    found = library.load()
    return found if isinstance(found, str) else None


def vectors(wanted: str = "") -> list[str]:
    """Names of the vector instructions this processor has, the best last.

    Args:
        wanted: those to use from now on; the best ones where empty.
    """
    names: bytes = library.library_and_threads()[0].headwise_vectors(wanted.encode())
    return names.decode().split()


def instructions() -> str:
    """Name of the vector instructions in use."""
    name: bytes = library.library_and_threads()[0].headwise_chosen()
    return name.decode()


def read(buffer: torch.Tensor) -> int:
    """Read a contiguous tensor once with all threads, and return the sum of its bits: for measuring bandwidth."""
    functions, parallel_for = library.library_and_threads()
    shares = torch.get_num_threads()
    sums = torch.zeros(shares, dtype=torch.int64, device="cpu")
    functions.headwise_read(buffer.data_ptr(), buffer.nbytes // 8, shares, sums.data_ptr(), parallel_for)
    return int(sums.sum())


KERNELS = Kernels(
    "cpu",
    obstacle,
    ragged_decode,
    append,
    attention,
    attention_and_mass,
    column_mass,
    attention_and_peaks,
    code_bits=CODE_BITS,
    instructions=instructions,
)
