"""Packed: rows of numbers -> pages of codes in one format, and what of them is asked for as numbers again."""

from __future__ import annotations

from dataclasses import replace

import torch

from headwise.quant.codes import decode, encode, rotation
from headwise.quant.formats import RowFormat
from headwise.store.pages import PagedStore
from headwise.store.rows import Rows
from headwise.types import Packing, PageView, Tensor

# Rows that are encoded at a time: their numbers are rotated in fp32.
_BLOCK = 1024


class PackedPages:
    """Rows of one layer that are stored in one format.

    Args:
        like: rows of the kind that will come, as numbers.
        format: of all rows.
        page_size: rows in a page.
        scored: whether rows carry an accumulated score.

    Raises:
        ConfigurationError: when the format does not suit the head dimensions.
    """

    def __init__(self, like: Rows, format: RowFormat, *, page_size: int, scored: bool) -> None:
        self.format = format
        self.key_dim, self.value_dim = like.keys.shape[-1], like.values.shape[-1]
        self.dtype = like.keys.dtype
        none = self.encode(like.cut(slice(0, 0)))
        self.pages = PagedStore.like(none, page_size=page_size, scored=scored)

    def view(self) -> PageView:
        """What a decode kernel reads."""
        pages = self.pages
        assert pages.key_steps is not None and pages.value_steps is not None
        turns = rotation(self.key_dim, pages.device), rotation(self.value_dim, pages.device)
        packing = Packing(self.format.key_bits, self.format.value_bits, pages.key_steps, pages.value_steps, *turns)
        return replace(pages.view(), packing=packing)

    def encode(self, rows: Rows) -> Rows:
        """The same rows as codes."""
        keys, values = [], []
        format = self.format
        for start in range(0, max(rows.keys.shape[2], 1), _BLOCK):
            part = slice(start, start + _BLOCK)
            keys.append(_encoded(rows.keys[:, :, part], format.key_bits, format.group_of(self.key_dim)))
            values.append(_encoded(rows.values[:, :, part], format.value_bits, format.group_of(self.value_dim)))
        (key_codes, key_steps), (value_codes, value_steps) = _joined(keys), _joined(values)
        return replace(rows, keys=key_codes, values=value_codes, key_steps=key_steps, value_steps=value_steps)

    def decode(self, rows: Rows) -> Rows:
        """Codes as the numbers they stand for."""
        assert rows.key_steps is not None and rows.value_steps is not None
        keys = decode(rows.keys, rows.key_steps, self.format.key_bits) @ rotation(self.key_dim, rows.keys.device).T
        values = decode(rows.values, rows.value_steps, self.format.value_bits)
        values = values @ rotation(self.value_dim, rows.values.device).T
        numbers = (keys.to(self.dtype), values.to(self.dtype))
        return replace(rows, keys=numbers[0], values=numbers[1], key_steps=None, value_steps=None)


def _encoded(numbers: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    return encode(numbers.float() @ rotation(numbers.shape[-1], numbers.device), bits, group)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    codes, steps = zip(*parts, strict=True)
    return torch.cat(codes, dim=2), torch.cat(steps, dim=2)
