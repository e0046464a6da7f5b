"""Coded: rows of numbers -> pages of codes in one format, and what of them is asked for as numbers again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from headwise.kernels.interface import Coding, PageView
from headwise.quant.codes import STEP_DTYPE, decode, encode, hadamard
from headwise.quant.formats import Precision, RowFormat
from headwise.store.narrow import within
from headwise.store.pages import PagePool
from headwise.store.row_parts import STEPS, row_parts
from headwise.store.rows import Rows
from headwise.types import Bool, Float, Int, Tensor

# Rows that are encoded at a time: their numbers are rotated in fp32.
_BLOCK = 1024

_UNCODED = "such a model's rows are better kept exact"


class CodedPages:
    """Rows of one layer that are stored in one format.

    Args:
        heads: sequences, and KV heads.
        key_dim, value_dim: head dimensions.
        dtype: of the numbers that come and go.
        format: of all rows.
        page_size: rows in a page.
        scored: whether rows carry an accumulated score.
        biased: whether their logits have a bias.

    Raises:
        ConfigurationError: when the format does not suit the head dimensions.
    """

    def __init__(
        self,
        heads: Sequence[int],
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        format: RowFormat,
        *,
        page_size: int,
        scored: bool,
        biased: bool = False,
        device: torch.device,
    ) -> None:
        self.format, self.dtype = format, dtype
        self.key_dim, self.value_dim = key_dim, value_dim
        parts = row_parts(key_dim, value_dim, dtype, format, scored=scored, biased=biased)
        self.pool = PagePool(heads, parts, page_size=page_size, device=device)

    def view(self) -> PageView:
        """What a kernel reads."""
        key_steps, value_steps = (self.pool.pools[name] for name in STEPS)
        matrices = hadamard(self.key_dim, self.pool.device), hadamard(self.value_dim, self.pool.device)
        return replace(
            self.pool.view(),
            coding=Coding(self.format.key_bits, self.format.value_bits, key_steps, value_steps, *matrices),
        )

    def encode(self, rows: Rows) -> Rows:
        """The same rows as codes."""
        format = self.format
        key_codes, key_steps = _encoded(rows.keys, format.key_bits, format.group_of(self.key_dim))
        value_codes, value_steps = self._encode_values(rows.values)
        return rows.replacing(keys=key_codes, values=value_codes, key_steps=key_steps, value_steps=value_steps)

    def replace_values(self, values: Float[Tensor, "b h n e"]) -> None:
        """Give the kept rows other values, as numbers."""
        for part, content in zip(("values", STEPS[1]), self._encode_values(values), strict=True):
            self.pool.replace(part, content)

    def _encode_values(self, values: Float[Tensor, "b h n e"]) -> tuple[Tensor, Tensor]:
        return _encoded(values, self.format.value_bits, self.format.group_of(self.value_dim))

    def decode(self, rows: Rows) -> Rows:
        """Codes as the numbers they stand for."""
        key_steps, value_steps = (rows.parts[name] for name in STEPS)
        device = rows.keys.device
        keys = decode(rows.keys, key_steps, self.format.key_bits) @ hadamard(self.key_dim, device).T
        values = decode(rows.values, value_steps, self.format.value_bits) @ hadamard(self.value_dim, device).T
        return rows.without(*STEPS).replacing(keys=keys.to(self.dtype), values=values.to(self.dtype))


def old_rows(
    precision: Precision, formats: Int[Tensor, "b h"], rank: Int[Tensor, "b h n"], lengths: Int[Tensor, "b h 1"]
) -> Bool[Tensor, "b h n"]:
    """Rows that are codes or should be, by their order among the rows of their head.

    Args:
        formats: of each head, -1 for one that stays exact.
    """
    inside = (rank >= precision.sinks) & (rank < lengths - precision.recent)
    return inside & (formats >= 0)[:, :, None]


def encode_old(precision: Precision, formats: Int[Tensor, "b h"], exact: PagePool, coded: Sequence[CodedPages]) -> None:
    """Write exact rows that have grown old down as codes."""
    old = _old_in_pool(precision, formats, exact)
    if not bool(old.any()):
        return
    rows = exact.gather(old)
    named = by_format(rows.keep, formats, len(coded), precision.later)
    for part, keep in zip(coded, named, strict=True):
        if bool(keep.any()):
            part.pool.commit(part.pool.occupied(), part.encode(rows).naming(keep))
    exact.drop(~old)


def _old_in_pool(precision: Precision, formats: Int[Tensor, "b h"], exact: PagePool) -> Bool[Tensor, "b h n"]:
    """Rows among the exact ones that should be codes, by their columns."""
    occupied, columns = exact.occupied(), exact.kept("columns")
    assert columns is not None
    columns = columns.masked_fill(~occupied, torch.iinfo(torch.int32).max)
    rank = columns.argsort(dim=-1).argsort(dim=-1)
    return old_rows(precision, formats, rank, exact.lengths[:, :, None]) & occupied


def by_format(
    rows: Bool[Tensor, "b h n"], formats: Int[Tensor, "b h"], count: int, format: int | None = None
) -> list[Bool[Tensor, "b h n"]]:
    """Which of the rows go where: all into one of `count` formats, or each into that of its head."""
    if format is not None:
        return [rows if index == format else torch.zeros_like(rows) for index in range(count)]
    return [rows & (formats == index)[:, :, None] for index in range(count)]


def _encoded(numbers: Float[Tensor, "b h n d"], bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes of the numbers, and the steps they are read by."""
    codes, steps = [], []
    for block in numbers.split(_BLOCK, dim=2):
        turned = block.float() @ hadamard(block.shape[-1], block.device)
        coded = encode(within(turned, STEP_DTYPE, "rows that become codes", _UNCODED), bits, group)
        codes.append(coded[0])
        steps.append(coded[1])
    return torch.cat(codes, dim=2), torch.cat(steps, dim=2)
