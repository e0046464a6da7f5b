"""Kernels of rows: the Triton kernels that write into pages -> each against the reference, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from headwise.kernels import reference
from headwise.kernels.interface import Kernels
from headwise.quant.formats import RowFormat
from kernel_calls import add_increments, append
from kernel_inputs import coded_pages, content_of, filled, poison, strided
from on_gpu.cases import Case, Figures, Setting
from on_gpu.compare import Pair, compare

_LENGTHS = [[4096, 1, 700, 0], [17, 8000, 64, 33]]
_TINY = [[5, 1, 17, 0], [0, 48, 33, 16]]


@dataclass(frozen=True)
class Append:
    """One call of `append`.

    Attributes:
        fresh: new rows.
        real: whether some of them are padding.
        transposed: whether keys lie channel by channel inside a page, as another host has them.
    """

    dtype: torch.dtype = torch.bfloat16
    fresh: int = 1
    scored: bool = False
    increments: bool = False
    biased: bool = False
    real: bool = False
    transposed: bool = False
    dims: tuple[int, int] = (128, 128)
    page_size: int = 16

    @property
    def name(self) -> str:
        """What differs from the plainest call."""
        words = [f"append {self.fresh}, {str(self.dtype).removeprefix('torch.')}, {self.dims} channels"]
        flags = ("scored", "increments", "biased", "real", "transposed")
        return ", ".join([*words, *(flag for flag in flags if getattr(self, flag))])

    def check(self, setting: Setting, kernels: Kernels) -> Figures:
        """What each kernel leaves in a store of its own."""
        lengths, fresh = _TINY if setting.tiny else _LENGTHS, self.fresh
        heads, longest = (len(lengths), len(lengths[0])), max(map(max, lengths))
        torch.manual_seed(0)
        with torch.device(setting.device):
            rows = [strided(*heads, fresh, dim, dtype=self.dtype) for dim in self.dims]
            columns = torch.arange(100, 100 + fresh)
            real = (torch.rand(fresh, heads[0]) < 0.6).T if self.real else None
            scores = torch.rand(*heads, fresh + 2)[:, :, 2:] if self.scored else None
            there = torch.arange(longest) < torch.tensor(lengths)[:, :, None]
            more = torch.rand(*heads, longest).where(there, torch.nan) if self.increments else None
        left = []
        for one in (kernels, reference):
            torch.manual_seed(1)
            with torch.device(setting.device):
                store = filled(lengths, *self.dims, self.dtype, self.page_size, self.scored, self.biased)
            store.pages.reserve(fresh)
            view = store.view()
            if self.transposed:
                view = replace(view, keys=view.keys.mT.contiguous().mT)
            append(one, view, *rows, columns, real, scores, more)
            store.pages.longest += fresh
            store.pools["keys"].copy_(view.keys)
            left.append(content_of(store))
        names = ["lengths", "keys", "values", "columns", "scores", "biases"]
        pairs = zip(names, *left, strict=False)
        return compare([Pair(name, found, expected) for name, found, expected in pairs])


def _increments_of_codes(setting: Setting, kernels: Kernels) -> Figures:
    """Those of rows that are codes reach their scores, in every view."""
    lengths, exact = [[1030, 5], [0, 47]], [[7, 7], [7, 7]]
    torch.manual_seed(0)
    with torch.device(setting.device):
        there = torch.arange(1030) < torch.tensor(lengths)[:, :, None]
        increments = torch.cat([torch.rand(2, 2, 7), torch.rand(2, 2, 1030).where(there, torch.nan)], dim=2)
    found = []
    for one in (kernels, reference):
        torch.manual_seed(1)
        with torch.device(setting.device):
            store = filled(exact, 16, 16, scored=True)
            part = coded_pages(lengths, RowFormat(4, 8), 16, 16, scored=True)
            add_increments(one, [store.view(), part.view()], increments)
        found.append([store.kept("scores"), part.pool.kept("scores")[there], part.pool.lengths])
    names = ("scores of exact rows", "scores of codes", "lengths")
    return compare([Pair(*each) for each in zip(names, *found, strict=True)])


def _increments_alone(setting: Setting, kernels: Kernels) -> Figures:
    """They take several programs, and no row is new."""
    found = []
    for one in (kernels, reference):
        torch.manual_seed(1)
        with torch.device(setting.device):
            store = filled([[2050, 5]], 16, 16, scored=True)
            nothing = poison(1, 2, 0, 16), poison(1, 2, 0, 16), torch.zeros(0, dtype=torch.long), None, poison(1, 2, 0)
            append(one, store.view(), *nothing, torch.rand(1, 2, 2050))
        found.append(store.kept("scores")[store.occupied()])
    return compare([Pair("scores", *found)])


_FP32, _FP16 = torch.float32, torch.float16

APPENDS = (
    Append(),
    Append(scored=True, increments=True),
    Append(biased=True, dims=(64, 64)),
    Append(fresh=37, scored=True, increments=True, biased=True),
    Append(fresh=20, real=True),
    Append(_FP32, fresh=3, scored=True, real=True, dims=(64, 64)),
    Append(_FP16, fresh=7, scored=True, increments=True, real=True, dims=(11, 7), page_size=3),
    Append(transposed=True),
    Append(_FP32, fresh=600, dims=(80, 80), page_size=1),
)


def row_cases(setting: Setting, kernels: Kernels) -> list[Case]:
    """All kernels that write."""
    first, *others = [Case(one.name, partial(one.check, setting, kernels)) for one in APPENDS]
    of_codes = Case("increments of rows that are codes", partial(_increments_of_codes, setting, kernels))
    alone = Case("increments and no new row", partial(_increments_alone, setting, kernels))
    return [first, of_codes, *others, alone]
