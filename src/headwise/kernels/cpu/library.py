"""Library: the compiled file beside this one -> its functions, ready for ctypes, or why they cannot be had.

It is built with the package (`csrc/compile.py`) and works on torch's own threads.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import torch

from headwise.types import Tensor


class _Kind(TypedDict):
    dtype: torch.dtype
    device: str


_BUILT = Path(__file__).with_name(f"libheadwise_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}")
# Another may be named, so that changed sources can be tried without building over the one in use.
LIBRARY = Path(os.environ.get("HEADWISE_CPU_LIBRARY") or _BUILT)

# What the kernels write, whatever torch makes unless told otherwise.
FLOAT: _Kind = {"dtype": torch.float32, "device": "cpu"}


@cache
def load() -> tuple[ctypes.CDLL, int] | str:
    """The library and torch's parallel loop, or why they cannot be had."""
    if not LIBRARY.is_file():
        return "they were not compiled when headwise was installed; install a C++ compiler and then headwise again"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        torch_library = ctypes.CDLL(_torch_library())
        parallel_for = ctypes.cast(torch_library.torch_parallel_for, c_void_p).value
    except (OSError, AttributeError) as error:
        return f"the compiled library does not load: {error}"
    assert parallel_for is not None
    for name, result in (("decode", c_int32), ("append", c_int32), ("attention", c_int64)):
        function: Any = getattr(library, f"headwise_{name}")
        function.argtypes, function.restype = [c_void_p], result
    library.headwise_read.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_void_p]
    library.headwise_read.restype = None
    library.headwise_vectors.argtypes = [ctypes.c_char_p]
    library.headwise_vectors.restype = library.headwise_chosen.restype = ctypes.c_char_p
    library.headwise_vectors(b"")
    return library, parallel_for


def library_and_threads() -> tuple[ctypes.CDLL, int]:
    """The library and torch's parallel loop, where `load` has them."""
    found = load()
    assert not isinstance(found, str), found
    return found


def pointer(tensor: Tensor | None) -> int | None:
    """Where its numbers lie; null for None."""
    return None if tensor is None else tensor.data_ptr()


def _torch_library() -> str:
    folder = Path(torch.__file__).parent / "lib"
    return str(folder / f"libtorch_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}")
