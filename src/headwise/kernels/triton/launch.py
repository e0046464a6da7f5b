"""Triton launch: tensors and a model's options -> what every launch of a Triton kernel needs to know of them."""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any

import torch

from headwise.kernels.interface import Marks
from headwise.types import LogitOptions, Tensor

# Options of every launch. Triton 3.10 no longer joins products and sums by itself.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}

LOG2_E = 1.4426950408889634


@functools.cache
def device_code() -> ModuleType:
    """The kernels that decode; imported only where they are wanted, because they need Triton."""
    from headwise.kernels.triton import device_pages

    return device_pages


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which is not the tensors' where a model is spread over several."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def dense_rows(tensor: Tensor) -> Tensor:
    """The same numbers with the last axis dense, as the kernels read it; hardly ever a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def is_narrow(*operands: Tensor) -> bool:
    """Whether products may go to the tensor cores as they are: all in one 16-bit type, summed in fp32."""
    dtype = operands[0].dtype
    if dtype == torch.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        return all(other.dtype == dtype for other in operands) and not _interpreted()
    return dtype == torch.float16 and all(other.dtype == dtype for other in operands)


@functools.cache
def _interpreted() -> bool:
    import triton

    return not isinstance(device_code().attend, triton.JITFunction)


def strides(tensor: Tensor | None) -> tuple[int, int]:
    """Of the first two axes, or any numbers where there is no tensor."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def told_of(marks: Marks | None) -> dict[str, Any]:
    """What every launch is told of gates and of the marks of columns, by name; that nothing is compiles to nothing."""
    if marks is None:
        return dict.fromkeys(("gates", "gate_stride", "marks", "marks_b"))
    columns = dense_rows(marks.columns)
    gates = {"gates": marks.gates, "gate_stride": marks.gates.stride()}
    return gates | {"marks": columns, "marks_b": columns.stride(0)}


def factors(options: LogitOptions) -> tuple[float, float | None]:
    """Factors inside and outside of a soft cap that make logits in base 2."""
    if options.softcap is None:
        return options.scaling * LOG2_E, None
    return options.scaling / options.softcap, options.softcap * LOG2_E


def power(number: int, least: int = 16) -> int:
    """The next power of two; a tensor core's tile takes 16 at least."""
    return max(least, 1 << (number - 1).bit_length())
