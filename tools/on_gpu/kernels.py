"""Kernels: the Triton kernels and a device -> each of them against the reference, on shapes and dtypes that matter.

What matters most stands first: a time limit cuts off the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from headwise.kernels import reference
from headwise.kernels.interface import Kernels
from headwise.kernels.triton.backend import KERNELS
from headwise.quant.formats import RowFormat
from headwise.store import pages
from headwise.types import LogitOptions
from kernel_inputs import coded_pages, decode_request, filled, poisoning, some_marks
from on_gpu.cases import Case, Figures, Setting
from on_gpu.compare import CODED_LOGITS, CODED_OUTPUT, LOGITS, OUTPUT, compare_decoded
from on_gpu.kernels_captured import captured_cases
from on_gpu.kernels_maps import map_cases
from on_gpu.kernels_rows import row_cases

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Rows of every head: long, short, none, and what just fills a page or a block.
_LENGTHS = [[4096, 1, 700, 2500, 0, 17, 3000, 64], [8000, 33, 128, 129, 1, 4095, 0, 16]]
_CODED_LENGTHS = [[3000, 0, 1, 64, 500, 2047, 63, 4000], [16, 900, 8000, 0, 5, 128, 65, 2]]
_TINY, _TINY_CODED = [[0, 17], [33, 5]], [[20, 0], [3, 33]]
_TINY_DIM = 32

_SOFT_CAP, _SINKS = "soft cap", "sinks"


@dataclass(frozen=True)
class Decode:
    """One call of `ragged_decode`.

    Attributes:
        dims: channels of keys and of values; one number is both.
        group: query heads per KV head.
        rows: queries, and fresh rows.
        formats: of the rows that are codes; beside them there are exact ones.
        kind: of logits.
        marked: how many columns have marks.
        roomy: whether views are as long as their pages have room, as in a captured step.
        empty: whether there are no exact rows.
    """

    dtype: torch.dtype = BF16
    dims: int | tuple[int, int] = 128
    group: int = 4
    rows: tuple[int, int] = (1, 1)
    formats: tuple[RowFormat, ...] = ()
    kind: str = ""
    masked: bool = False
    biased: bool = False
    marked: int = 0
    with_mass: bool = True
    roomy: bool = False
    empty: bool = False
    page_size: int = 16

    @property
    def name(self) -> str:
        """What differs from the plainest call."""
        words = [f"{str(self.dtype).removeprefix('torch.')}, {self.dims} channels, group {self.group}"]
        words += [f"{self.rows[0]} queries, {self.rows[1]} fresh"] if self.rows != (1, 1) else []
        words += [f"K{f.key_bits}V{f.value_bits}" + (f" by {f.group}" if f.group else "") for f in self.formats]
        flags = {
            "mask": self.masked,
            "biases": self.biased,
            "marks": self.marked,
            "as long as there is room": self.roomy,
        }
        flags |= {"no mass": not self.with_mass, "no exact rows": self.empty, self.kind: self.kind}
        words += [word for word, on in flags.items() if on]
        words += [f"pages of {self.page_size}"] if self.page_size != 16 else []
        return "decode, " + ", ".join(words)

    def check(self, setting: Setting, kernels: Kernels) -> Figures:
        """Both kernels on the same inputs."""
        torch.manual_seed(0)
        with torch.device(setting.device):
            request = self._request(
                _TINY if setting.tiny else _LENGTHS, _TINY_CODED if setting.tiny else _CODED_LENGTHS
            )
        if self.roomy:
            request = replace(request, pages=[replace(view, longest=view.capacity) for view in request.pages])
        found, expected = kernels.ragged_decode(request), reference.ragged_decode(request)
        if self.formats:
            return compare_decoded(found, expected, CODED_OUTPUT[self.dtype], CODED_LOGITS[self.dtype])
        return compare_decoded(found, expected, OUTPUT[self.dtype], LOGITS)

    def _request(self, lengths: list[list[int]], coded: list[list[int]]):
        key_dim, value_dim = (self.dims, self.dims) if isinstance(self.dims, int) else self.dims
        if lengths is _TINY:
            key_dim, value_dim = min(key_dim, _TINY_DIM), min(value_dim, _TINY_DIM)
        like = key_dim, value_dim, self.dtype, self.page_size
        if self.empty:
            lengths = [[0] * len(row) for row in lengths]
        store = filled(lengths, *like, biased=self.biased)
        views = [coded_pages(coded, format, *like, biased=self.biased).view() for format in self.formats]
        heads, options, marks = (len(lengths), len(lengths[0])), None, None
        if self.kind == _SOFT_CAP:
            options = LogitOptions(0.7, softcap=1.5)
        elif self.kind == _SINKS:
            options = LogitOptions(key_dim**-0.5, sinks=torch.randn(heads[1], self.group))
        queries, fresh = self.rows
        if self.marked:
            marks = some_marks(*heads, self.group, queries, self.marked, fresh)
        given = {"masked": self.masked, "options": options, "with_mass": self.with_mass, "marks": marks}
        return decode_request(store, self.group, queries, fresh, coded=views, **given)


_8, _4 = RowFormat(8, 8), RowFormat(4, 4)

DECODES = (
    Decode(),
    Decode(with_mass=False),
    Decode(formats=(_8,)),
    Decode(formats=(_4,)),
    Decode(FP16),
    Decode(FP32),
    Decode(roomy=True, formats=(_8, _4)),
    Decode(dims=64, group=3),
    Decode(FP32, dims=64, group=3),
    Decode(FP32, formats=(_8, _4)),
    Decode(rows=(5, 5)),
    Decode(masked=True, rows=(3, 5)),
    Decode(formats=(_8, RowFormat(8, 4), _4), with_mass=False),
    Decode(formats=(RowFormat(8, 8, 32), RowFormat(4, 4, 32)), dims=128),
    Decode(kind=_SOFT_CAP, dims=256, group=2),
    Decode(kind=_SINKS, dims=64, group=8),
    Decode(biased=True),
    Decode(marked=300),
    Decode(formats=(_8,), marked=300, dims=64),
    Decode(rows=(70, 70), group=2),
    Decode(dims=128, group=1),
    Decode(dims=128, group=8),
    Decode(empty=True, rows=(2, 2)),
    Decode(empty=True, formats=(_4,)),
    Decode(FP16, formats=(_8, _4), masked=True, biased=True, rows=(3, 4)),
    Decode(FP32, masked=True, biased=True, kind=_SOFT_CAP, rows=(2, 3), dims=(80, 64)),
    Decode(FP16, dims=(192, 128), group=1),
    Decode(formats=(RowFormat(4, 8),), dims=256, group=2),
    Decode(FP32, formats=(_4,), kind=_SINKS, marked=50, dims=64),
    Decode(dims=(11, 7), group=5, page_size=3, masked=True, biased=True, marked=20, rows=(4, 6)),
    Decode(FP16, dims=80, page_size=1),
    Decode(rows=(19, 21), group=4, dims=64, masked=True),
    Decode(FP32, rows=(70, 70), group=2, dims=32, with_mass=False),
)


def cases(setting: Setting, kernels: Kernels = KERNELS) -> list[Case]:
    """All kernels; the first of each kind stand before the second ones.

    Args:
        kernels: those to check.
    """
    # What no row has written is not a number, so that whoever reads it is found out.
    pages.empty = poisoning(pages.empty)
    decodes = [Case(decode.name, partial(decode.check, setting, kernels)) for decode in DECODES]
    return in_turn(decodes, captured_cases(setting, kernels), row_cases(setting, kernels), map_cases(setting, kernels))


def in_turn(*lists: Sequence[Case]) -> list[Case]:
    """One of each list after the other, until all are through."""
    longest = max(map(len, lists))
    return [cases[index] for index in range(longest) for cases in lists if index < len(cases)]
