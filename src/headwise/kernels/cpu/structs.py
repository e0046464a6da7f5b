"""Structs: views and rows -> the C structs of `csrc/headwise.h`, which must have the same fields in the same order."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch

from headwise.errors import InputError
from headwise.kernels.cpu.library import pointer
from headwise.kernels.interface import Coding, Marks, PageView
from headwise.types import Tensor

# Of the codes that the kernels read.
CODE_BITS = frozenset({4, 8})

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


class CodingStruct(ctypes.Structure):
    """How the codes of the keys, or of the values, are read."""

    _fields_ = [("steps", c_void_p), ("hadamard", c_void_p), ("bits", c_int64), ("groups", c_int64)]


class PagesStruct(ctypes.Structure):
    """Pages of one layer."""

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values", "columns", "scores", "biases", "table", "lengths")),
        *((name, c_int64) for name in ("page_count", "page_size", "table_width", "longest")),
        *((name, c_int64) for name in ("key_width", "value_width", "type")),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        ("key_coding", CodingStruct),
        ("value_coding", CodingStruct),
    ]


class FreshStruct(ctypes.Structure):
    """Rows beside the pages."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("count", c_int64),
        ("key_strides", c_int64 * 4),
        ("value_strides", c_int64 * 4),
    ]


class MarksStruct(ctypes.Structure):
    """What columns have beside."""

    _fields_ = [
        *((name, c_void_p) for name in ("columns", "fresh", "gates")),
        ("count", c_int64),
        ("gate_strides", c_int64 * 4),
    ]


class DecodeStruct(ctypes.Structure):
    """What `headwise_decode` takes."""

    _fields_ = [
        ("pages", ctypes.POINTER(PagesStruct)),
        ("views", c_int64),
        ("fresh", FreshStruct),
        *((n, c_void_p) for n in ("query", "mask", "sinks", "output", "lse", "on_kept", "on_fresh")),
        *((name, c_int64) for name in ("batch", "heads", "group", "queries", "key_dim", "value_dim", "shares")),
        ("query_strides", c_int64 * 5),
        ("mask_columns", c_int64),
        ("mask_strides", c_int64 * 3),
        ("marks", MarksStruct),
        ("scaling", c_float),
        ("softcap", c_float),
        ("parallel_for", c_void_p),
    ]


class AppendStruct(ctypes.Structure):
    """What `headwise_append` takes."""

    _fields_ = [
        ("pages", PagesStruct),
        ("rows", FreshStruct),
        *((name, c_void_p) for name in ("columns", "real", "scores", "increments")),
        *((name, c_int64) for name in ("batch", "heads", "increment_rows", "increment_stride")),
        ("parallel_for", c_void_p),
    ]


def marks_struct(marks: Marks | None) -> tuple[tuple[Tensor | None, ...], MarksStruct]:
    """Marks, and the tensors that must live as long as the structure."""
    if marks is None:
        return (), MarksStruct()
    # Never empty: an address of none would say that nothing is marked.
    columns = marks.columns.contiguous() if marks.columns.numel() else marks.columns.new_zeros(len(marks.columns), 1)
    fresh = None if marks.fresh is None else marks.fresh.contiguous()
    held = MarksStruct(
        columns.data_ptr(), pointer(fresh), marks.gates.data_ptr(), columns.shape[1], marks.gates.stride()
    )
    return (columns, fresh, marks.gates), held


def pages_struct(view: PageView) -> PagesStruct:
    """A view, as long as its tensors live; in what it is put into, it is copied."""
    checked = view.checked
    if checked is None:
        return _made(view)
    if checked.compiled is None:
        checked.compiled = _made(view)
    known: PagesStruct = checked.compiled
    known.longest = view.longest
    return known


def _made(view: PageView) -> PagesStruct:
    keys, values, table = view.keys, view.values, view.table
    if not (table.is_contiguous() and view.lengths.is_contiguous()):
        raise InputError("the compiled CPU kernels take page tables and lengths that are dense, and these have strides")
    page_count, page_size, key_width = keys.shape
    return PagesStruct(
        keys.data_ptr(),
        values.data_ptr(),
        pointer(view.columns),
        pointer(view.scores),
        pointer(view.biases),
        table.data_ptr(),
        view.lengths.data_ptr(),
        page_count,
        page_size,
        table.shape[-1],
        view.longest,
        key_width,
        values.shape[2],
        TYPES[keys.dtype],
        keys.stride(),
        values.stride(),
        *(_EXACT if view.coding is None else _codings(view.coding)),
    )


def fresh_struct(keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], FreshStruct]:
    """Rows in the type of the pages, and the tensors that must live as long as the structure."""
    if keys.dtype is not dtype or keys.stride(-1) != 1:
        keys = keys.to(dtype).contiguous()
    if values.dtype is not dtype or values.stride(-1) != 1:
        values = values.to(dtype).contiguous()
    rows = FreshStruct(keys.data_ptr(), values.data_ptr(), keys.shape[2], keys.stride(), values.stride())
    return (keys, values), rows


# Rows that are numbers. It is copied into whatever has it.
_EXACT = CodingStruct(), CodingStruct()


def _codings(coding: Coding) -> tuple[CodingStruct, CodingStruct]:
    return (
        _coding(coding.key_bits, coding.key_steps, coding.key_hadamard),
        _coding(coding.value_bits, coding.value_steps, coding.value_hadamard),
    )


def _coding(bits: int, steps: Tensor, hadamard: Tensor) -> CodingStruct:
    assert bits in CODE_BITS
    return CodingStruct(steps.data_ptr(), hadamard.data_ptr(), bits, steps.shape[-1] // 2)
