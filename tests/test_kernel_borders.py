"""The border to compiled code: what does not fit is refused with what was given, and nothing is read or written."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from headwise.errors import InputError
from headwise.kernels.cpu import backend as cpu
from headwise.kernels.interface import (
    AppendRequest,
    AttentionMap,
    DecodeRequest,
    MassRequest,
    PeaksRequest,
)
from headwise.kernels.triton import backend as triton
from headwise.quant.formats import RowFormat
from headwise.types import LogitOptions
from kernel_inputs import packed, packed_codes

LENGTHS = [[9, 4], [0, 7]]
KERNELS = {"cpu": cpu.KERNELS, "triton": triton.KERNELS}
# How a tensor can be another than the one that is expected.
CHANGES = {
    "another type": lambda t: t.to(torch.int16),
    "on another device": lambda t: t.to("meta"),
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t[0],
    "one less at the front": lambda t: t[1:],
    "one more behind": lambda t: torch.cat([t, t[..., :1]], dim=-1),
}
# Those that a kernel may take: rows and weights of any type, and masks and tables that are longer than they must be.
ALLOWED = {
    *(("another type", name) for name in ("query", "fresh_keys", "fresh_values", "keys", "values", "sinks")),
    *(("another type", name) for name in ("weights", "widths")),
    *(("one more behind", name) for name in ("fresh_values", "values", "table of view 0", "table of view 1")),
    ("one less at the front", "widths"),
}


def pages():
    options = {"key_dim": 8, "value_dim": 6, "page_size": 3, "scored": True, "biased": True}
    return [packed(LENGTHS, **options).view(), packed_codes(LENGTHS, RowFormat(8, 4, 2), **options).view()]


def decode_request():
    views = pages()
    torch.manual_seed(1)
    options = LogitOptions(0.4, None, torch.randn(2, 2))
    mask = torch.ones(2, 1, 21, dtype=torch.bool)
    rows = torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 6)
    return DecodeRequest(torch.randn(2, 2, 2, 1, 8), views, *rows, mask, options, with_mass=True)


def append_request():
    views = pages()
    rows = torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 6)
    increments = torch.rand(2, 2, sum(view.longest for view in views))
    real = torch.ones(2, 2, dtype=torch.bool)
    return AppendRequest(views, *rows, torch.arange(2), real, torch.rand(2, 2, 2), increments)


def mass_request():
    map = AttentionMap(
        torch.randn(2, 2, 2, 3, 8),
        torch.randn(2, 2, 7, 8),
        torch.ones(2, 3, 7, dtype=torch.bool),
        LogitOptions(0.4, None, torch.randn(2, 2)),
        torch.tensor([1, 4, 6]),
    )
    return MassRequest(map, torch.ones(2, 3), torch.arange(7).expand(2, -1), torch.ones(3, 2, dtype=torch.long))


def peaks_request():
    map = replace(mass_request().map, columns=None)
    return PeaksRequest(map, torch.randn(2, 2, 7, 6), [slice(0, 3), slice(5, 7)])


def variants(request):
    """Every request that differs in one tensor: (what was done, name, request)."""
    for field in fields(request):
        value = getattr(request, field.name)
        if isinstance(value, torch.Tensor):
            for change, do in CHANGES.items():
                yield change, field.name, replace(request, **{field.name: do(value)})
        elif field.name == "options":
            for change, name, options in variants(value):
                yield change, name, replace(request, options=options)
        elif field.name == "map":
            for change, name, map in variants(value):
                yield change, name, replace(request, map=map)
        elif field.name == "coding" and value is not None:
            for change, name, coding in variants(value):
                yield change, name, replace(request, coding=coding)
        elif field.name == "pages":
            for index, view in enumerate(value):
                for change, name, other in variants(view):
                    named = f"{name} of view {index}"
                    yield change, named, replace(request, pages=[*value[:index], other, *value[index + 1 :]])


REQUESTS = {
    "ragged_decode": decode_request,
    "append": append_request,
    "column_mass": mass_request,
    "attention_and_peaks": peaks_request,
}


@pytest.mark.parametrize("function", REQUESTS)
@pytest.mark.parametrize("name", KERNELS)
def test_no_tensor_that_does_not_fit_reaches_a_kernel(name, function):
    call, request = getattr(KERNELS[name], function), REQUESTS[function]()
    call(request)
    seen, missed = 0, []
    for change, tensor, changed in variants(request):
        longer = function == "ragged_decode" and (change, tensor) == ("one more behind", "mask")
        if longer or (change, tensor) in ALLOWED:
            continue
        seen += 1
        try:
            call(changed)
        except InputError:
            continue
        missed.append((change, tensor))
    assert not missed
    assert seen > 20


def test_what_tables_lengths_and_columns_say_is_looked_at_where_it_is_read():
    """The compiled kernels read nothing outside of the pages, whatever has happened to them."""
    for change in (
        lambda view: view.table[0, 1].fill_(len(view.keys)),
        lambda view: view.table[1, 1, 0].fill_(-1),
        lambda view: view.lengths[0, 0].fill_(view.longest + 1),
        lambda view: view.lengths[1, 1].fill_(-1),
    ):
        for view in (0, 1):
            for function in ("ragged_decode", "append"):
                request = REQUESTS[function]()
                change(request.pages[view])
                before = [view.keys.clone().view(torch.uint8) for view in request.pages]
                with pytest.raises(InputError, match="outside of the pages"):
                    getattr(cpu.KERNELS, function)(request)
                if view == 0:
                    assert all(
                        torch.equal(a, b.keys.view(torch.uint8)) for a, b in zip(before, request.pages, strict=True)
                    )
    for column in (21, -1, 2**31 - 1):
        request = decode_request()
        # The last row of a head, in whatever page.
        view = request.pages[0]
        view.columns[view.table[0, 1, 1], 0] = column
        with pytest.raises(InputError, match="outside of the mask"):
            cpu.KERNELS.ragged_decode(request)


def test_rows_without_pages_for_them_are_refused():
    request = append_request()
    exact = request.pages[0]
    more = exact.capacity - int(exact.lengths.max()) + 1
    rows = torch.randn(2, 2, more, 8), torch.randn(2, 2, more, 6)
    scores, real = torch.rand(2, 2, more), torch.ones(2, more, dtype=torch.bool)
    before = exact.lengths.clone()
    with pytest.raises(InputError, match="outside of the pages"):
        cpu.KERNELS.append(AppendRequest([exact], *rows, torch.arange(more), real, scores))
    assert torch.equal(exact.lengths, before)


@pytest.mark.parametrize("part", ["columns", "scores", "biases"])
@pytest.mark.parametrize("function", ["ragged_decode", "append"])
@pytest.mark.parametrize("name", KERNELS)
def test_what_rows_have_beside_numbers_must_be_dense(name, function, part):
    call, request = getattr(KERNELS[name], function), REQUESTS[function]()
    for index, view in enumerate(request.pages):
        apart = torch.stack([getattr(view, part)] * 2, dim=-1)[..., 0]
        views = [*request.pages[:index], replace(view, **{part: apart}), *request.pages[index + 1 :]]
        with pytest.raises(InputError, match="dense"):
            call(replace(request, pages=views))


def test_tables_and_lengths_with_strides_are_refused_by_the_compiled_kernels():
    request = decode_request()
    views = [replace(view, lengths=view.lengths.T.contiguous().T) for view in request.pages]
    with pytest.raises(InputError, match="dense"):
        cpu.KERNELS.ragged_decode(replace(request, pages=views))


@pytest.mark.parametrize("name", KERNELS)
def test_ranges_of_columns_that_there_are_not_are_refused(name):
    request = peaks_request()
    for counted in ([slice(0, 8)], [slice(-1, 3)], [slice(4, 2)], [slice(0, 4), slice(3, 7)], []):
        with pytest.raises(InputError, match="range"):
            KERNELS[name].attention_and_peaks(replace(request, counted=counted))
