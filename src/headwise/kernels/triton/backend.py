"""Back end: the Triton kernels by name, and why they cannot run where they cannot.

Under TRITON_INTERPRET=1 the same code runs, slowly, on the CPU.
"""

from __future__ import annotations

import os

import torch

from headwise.kernels.attention import counting, dense_attention
from headwise.kernels.interface import Kernels, MassRequest
from headwise.kernels.triton.launch import device_code
from headwise.kernels.triton.map import attention_and_peaks, column_mass
from headwise.kernels.triton.pages import append, ragged_decode
from headwise.types import Float, Tensor


def obstacle(device: torch.device) -> str | None:
    """Why these kernels cannot run on that device; None where they can."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on the CPU only where TRITON_INTERPRET=1 is set, for tests"
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels need a CUDA device, not {device.type!r}"
    try:
        device_code()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


def attention_and_mass(request: MassRequest, values: Float[Tensor, "b h t e"]) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attention_and_mass`: torch's fused attention, and the mass beside it."""
    return dense_attention(request.map, values), *column_mass(counting(request))


KERNELS = Kernels(
    "triton",
    obstacle,
    ragged_decode,
    append,
    dense_attention,
    attention_and_mass,
    column_mass,
    attention_and_peaks,
    code_bits=frozenset({4, 8}),
)
