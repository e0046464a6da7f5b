"""Check: requests -> nothing where compiled code may take them as they are; else an error that says what was given.

Compiled code believes the shapes, types and devices it is told, so each request is looked at once. What tables, lengths
and columns say is checked where they are read, on the CPU; a GPU has them as `headwise.store` made them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.errors import InputError
from headwise.kernels.interface import (
    DTYPES,
    AppendRequest,
    AttentionMap,
    DecodeRequest,
    Marks,
    MassRequest,
    PageView,
    PeaksRequest,
)
from headwise.types import Tensor

_INTEGERS = (torch.int32, torch.int64)


def check_decode(request: DecodeRequest) -> None:
    """Refuse what `ragged_decode` cannot take.

    Raises:
        InputError: with what was given and what must hold.
    """
    query, keys, values = request.query, request.fresh_keys, request.fresh_values
    mask, sinks, pages = request.mask, request.options.sinks, request.pages
    fits = query.dim() == 5 and keys.dim() == 4 and values.dim() == 4 and len(pages) > 0
    if fits:
        # Sizes are taken out once: comparing whole shapes takes longer than all else here.
        batch, heads, group, queries, key_dim = query.shape
        of_sequences, of_heads, fresh, channels = keys.shape
        *of_values, value_dim = values.shape
        fits = (
            of_values == [batch, heads, fresh]
            and of_sequences == batch
            and of_heads == heads
            and channels == key_dim
            and _together(query, keys, values, mask, sinks)
            and (mask is None or _is_mask(mask, batch, queries, fresh))
            and (sinks is None or sinks.shape == (heads, group))
        )
        if fits and request.marks is not None:
            _check_marks(request.marks, query, None, fresh)
    if not fits:
        expected = "query [b, h, g, q, d], keys [b, h, f, d], values [b, h, f, e], all numbers; where there are any, "
        expected += "a mask [b, q, t] of bool with t >= f, and sinks [h, g]; pages; all on one device"
        raise _refused("decode", expected, query=query, keys=keys, values=values, mask=mask, sinks=sinks)
    for index, view in enumerate(pages):
        _check_view(view, query, batch, heads, (key_dim, value_dim), coded=index > 0)
        if view.columns is None and (mask is not None or request.marks is not None):
            raise InputError("a mask or marks were given, and the pages say no columns to look them up by")


def check_append(request: AppendRequest) -> None:
    """Refuse what `append` cannot take.

    Raises:
        InputError: with what was given and what must hold.
    """
    keys, values, columns, pages = request.keys, request.values, request.columns, request.pages
    real, scores, increments = request.real, request.scores, request.increments
    fits = keys.dim() == 4 and values.dim() == 4 and len(pages) > 0
    if fits:
        (batch, heads, count, dim), (*of_values, value_dim) = keys.shape, values.shape
        scored = pages[0].scores is not None
        fits = (
            of_values == [batch, heads, count]
            and columns.shape == (count,)
            and columns.dtype in _INTEGERS
            and (scores is not None) == scored
            and _together(keys, values, columns, real, scores, increments)
            and (real is None or (real.shape == (batch, count) and real.dtype is torch.bool))
            and (scores is None or (scores.shape == (batch, heads, count) and scores.dtype is torch.float32))
            and (increments is None or (scored and _are_increments(increments, batch, heads, pages)))
        )
    if not fits:
        expected = "keys [b, h, f, d], values [b, h, f, e], columns [f] of integers; where there are any, real [b, f] "
        expected += "of bool; scores [b, h, f] in fp32 where the pages have scores and only there, and then, where "
        expected += "there are any, increments [b, h, n] in fp32 over the rows of all pages; all on one device"
        given = {"keys": keys, "values": values, "columns": columns, "real": real}
        raise _refused("append", expected, **given, scores=scores, increments=increments)
    for index, view in enumerate(pages):
        # Pages of codes take in no rows; beside them the numbers' own may be left out.
        coded = index > 0 or (view.coding is not None and count == 0)
        _check_view(view, keys, batch, heads, None if coded else (dim, value_dim), coded=coded)
        if index > 0 and increments is not None and view.scores is None:
            raise InputError("increments were given, and some of the pages have no scores")


def check_attention(map: AttentionMap, values: Tensor) -> None:
    """Refuse what `attention` cannot take.

    Raises:
        InputError: with what was given and what must hold.
    """
    _check_map(map)
    if values.dim() != 4 or values.shape[:3] != map.keys.shape[:3] or values.device != map.keys.device:
        raise _refused("attention", "values [b, h, t, e] beside keys", values=values, keys=map.keys)


def check_mass(request: MassRequest) -> None:
    """Refuse what `column_mass` cannot take.

    Raises:
        InputError: with what was given and what must hold.
    """
    map, weights, positions, widths = request.map, request.weights, request.positions, request.widths
    _check_map(map)
    batch, queries, total = len(map.query), map.query.shape[3], map.keys.shape[2]
    fits = (
        weights.shape == (batch, queries)
        and positions.shape == (batch, total)
        and widths.shape[1:] == (batch,)
        and positions.dtype in _INTEGERS
        and all(one.device == map.query.device for one in (weights, positions, widths))
    )
    if not fits:
        expected = f"weights [b={batch}, q={queries}], positions [b, t={total}] of integers, widths [w, b], together"
        raise _refused("column_mass", expected, weights=weights, positions=positions, widths=widths)


def check_peaks(request: PeaksRequest) -> None:
    """Refuse what `attention_and_peaks` cannot take.

    Raises:
        InputError: with what was given and what must hold.
    """
    check_attention(request.map, request.values)
    counted, total, end = request.counted, request.map.keys.shape[2], 0
    for part in counted:
        if not end <= part.start <= part.stop <= total:
            raise InputError(f"the ranges {list(counted)} are not in order within {total} columns")
        end = part.stop
    if not counted:
        raise InputError("attention_and_peaks: there must be a range of columns to count, and none was given")


def _check_map(map: AttentionMap) -> None:
    query, keys, mask, columns, sinks = map.query, map.keys, map.mask, map.columns, map.options.sinks
    device = query.device
    fits = (
        query.dim() == 5
        and keys.dim() == 4
        and keys.shape[:2] == query.shape[:2]
        and keys.shape[3] == query.shape[4]
        and keys.device == device
        and query.is_floating_point()
        and keys.is_floating_point()
        and (columns is not None or query.shape[3] <= keys.shape[2])
    )
    if fits and mask is not None:
        seen = len(query), query.shape[3], keys.shape[2]
        fits = mask.shape == seen and mask.dtype is torch.bool and mask.device == device
    if fits and columns is not None:
        fits = columns.shape == query.shape[3:4] and columns.dtype in _INTEGERS and columns.device == device
        # Looking at them waits for a GPU; there they are those of a prompt, which its profile counted itself.
        if fits and device.type == "cpu" and len(columns):
            fits = bool((columns[0] >= 0) & (columns[-1] < keys.shape[2]) & (columns.diff() >= 0).all())
    if fits and sinks is not None:
        fits = sinks.shape == query.shape[1:3] and sinks.is_floating_point() and sinks.device == device
    if not fits:
        expected = "query [b, h, g, q, d], keys [b, h, t, d], all numbers; where there are any, a mask [b, q, t] of "
        expected += "bool, columns [q] of integers below t that never fall, and sinks [h, g]; all on one device"
        raise _refused("attention map", expected, query=query, keys=keys, mask=mask, columns=columns, sinks=sinks)
    if map.marks is not None:
        _check_marks(map.marks, query, keys.shape[2], None)


def _check_marks(marks: Marks, query: Tensor, total: int | None, fresh: int | None) -> None:
    """That marks are of so many columns, where it is said, and of so many fresh rows, where there are any."""
    gates, columns, of_fresh = marks.gates, marks.columns, marks.fresh
    fits = (
        gates.shape == query.shape[:4]
        and columns.dim() == 2
        and len(columns) == len(query)
        and (total is None or columns.shape[1] == total)
        and (of_fresh is None or of_fresh.shape == (len(query), fresh))
        and all(each.dtype is torch.float32 for each in (gates, columns, of_fresh) if each is not None)
        and _together(query, gates, columns, of_fresh)
    )
    if not fits:
        expected = "gates [b, h, g, q] and columns [b, m], of a map of all its columns; where there are any, fresh "
        expected += "[b, f]; all in fp32 on the device of the queries"
        raise _refused("marks", expected, gates=gates, columns=columns, fresh=of_fresh)


def _check_view(
    view: PageView, beside: Tensor, batch: int, heads: int, dims: tuple[int, int] | None, *, coded: bool
) -> None:
    """That the tensors of some pages belong together, and to rows with so many channels, where it is said."""
    checked, fitting = view.checked, (batch, heads, dims, coded)
    if checked is not None and fitting in checked.fitting and beside.device == view.table.device:
        return
    keys, values, table, lengths = view.keys, view.values, view.table, view.lengths
    columns, scores, biases, coding = view.columns, view.scores, view.biases, view.coding
    fits = keys.dim() == 3 and values.dim() == 3 and table.dim() == 3 and lengths.dim() == 2
    if fits:
        pages, size, key_width = keys.shape
        of_values, size_of_values, value_width = values.shape
        sequences, table_heads, _ = table.shape
        fits = (
            of_values == pages
            and size_of_values == size
            and sequences == batch
            and table_heads == heads
            and lengths.shape == (batch, heads)
            and table.dtype is torch.int32
            and lengths.dtype is torch.int64
            and values.dtype is keys.dtype
            and (coding is not None) == coded
            and _together(beside, keys, values, table, lengths)
            and (columns is None or (columns.dtype is torch.int32 and _is_dense(columns, pages, size, keys)))
            and (scores is None or (scores.dtype is torch.float32 and _is_dense(scores, pages, size, keys)))
            and (biases is None or (biases.dtype is torch.float16 and _is_dense(biases, pages, size, keys)))
        )
    if fits and coding is None:
        fits = keys.dtype in DTYPES and (key_width, value_width) == dims
    elif fits:
        fits = keys.dtype is torch.uint8 and keys.is_contiguous() and values.is_contiguous()
    if not fits:
        rows = "dense bytes of codes" if coded else f"fp32, bf16 or fp16, of {dims} channels"
        expected = f"keys and values [pages, s, ...], {rows}; table [b={batch}, h={heads}, p] in int32, lengths "
        expected += "[b, h] in int64; where there are any, dense columns [pages, s] in int32, scores in fp32 and "
        expected += "biases in fp16; all on one device"
        given = {"keys": keys, "values": values, "table": table, "lengths": lengths}
        raise _refused("pages", expected, **given, columns=columns, scores=scores, biases=biases)
    if coding is not None:
        _check_side(keys, coding.key_bits, coding.key_steps, coding.key_hadamard, dims and dims[0])
        _check_side(values, coding.value_bits, coding.value_steps, coding.value_hadamard, dims and dims[1])
    if checked is not None:
        checked.fitting.add(fitting)


def _check_side(codes: Tensor, bits: int, steps: Tensor, hadamard: Tensor, channels: int | None) -> None:
    """That codes of keys, or of values, are of so many channels, and come with what reads them."""
    groups, dim = steps.shape[-1] // 2, hadamard.shape[0] if channels is None else channels
    fits = (
        codes.shape[2] * 8 == dim * bits
        and steps.dim() == 3
        and steps.shape[:2] == codes.shape[:2]
        and steps.dtype is torch.float16
        and steps.is_contiguous()
        and groups > 0
        and steps.shape[2] == 2 * groups
        and dim % groups == 0
        and hadamard.shape == (dim, dim)
        and hadamard.dtype is torch.float32
        and hadamard.is_contiguous()
        and steps.device == codes.device
        and hadamard.device == codes.device
    )
    if not fits:
        expected = f"{bits}-bit codes of {dim} channels, with dense steps [pages, s, 2 * groups] in fp16 and a matrix "
        expected += f"[{dim}, {dim}] in fp32"
        raise _refused("codes", expected, codes=codes, steps=steps, matrix=hadamard)


def _together(first: Tensor, *others: Tensor | None) -> bool:
    """Whether they are all on one device."""
    device = first.device
    for other in others:  # noqa: SIM110  # a loop takes a third of the time of `all`, at every step of every layer
        if other is not None and other.device != device:
            return False
    return True


def _is_dense(tensor: Tensor, pages: int, size: int, beside: Tensor) -> bool:
    return tensor.shape == (pages, size) and tensor.is_contiguous() and tensor.device == beside.device


def _is_mask(mask: Tensor, batch: int, queries: int, fresh: int) -> bool:
    return (
        mask.dtype is torch.bool and mask.dim() == 3 and mask.shape[:2] == (batch, queries) and mask.shape[2] >= fresh
    )


def _are_increments(increments: Tensor, batch: int, heads: int, pages: Sequence[PageView]) -> bool:
    shape = batch, heads, sum([view.longest for view in pages])
    return increments.shape == shape and increments.dtype is torch.float32


def _refused(what: str, expected: str, **given: Tensor | None) -> InputError:
    said = ", ".join(f"{name} {_described(tensor)}" for name, tensor in given.items() if tensor is not None)
    return InputError(f"{what}: expected {expected}; given {said}")


def _described(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    strided = "" if tensor.is_contiguous() else f" with strides {tuple(tensor.stride())}"
    return f"{dtype} {list(tensor.shape)}{strided} on {tensor.device}"
