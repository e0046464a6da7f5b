"""Coded: rows of numbers -> pages of codes in one format, and what of them is asked for as numbers again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.kernels.interface import Coding, PageView
from headwise.quant.codes import STEP_DTYPE, decode, encode, hadamard
from headwise.quant.formats import Precision, RowFormat
from headwise.store.narrow import within
from headwise.store.pages import PagePool
from headwise.store.row_parts import STEPS, row_parts
from headwise.store.rows import Rows, side_by_side
from headwise.types import Bool, Float, Int, Tensor

_STEPS_OF = dict(zip(("keys", "values"), STEPS, strict=True))

# Rows of all heads that are encoded at a time: their numbers are rotated in fp32.
_BLOCK = 4096

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
        return self.pool.view(Coding(self.format.key_bits, self.format.value_bits, key_steps, value_steps, *matrices))

    def encode(self, rows: Rows) -> Rows:
        """The same rows as codes; only of those that count are any made."""
        format = self.format
        key_codes, key_steps = _encoded(rows.keys, rows.keep, format.key_bits, format.group_of(self.key_dim))
        value_codes, value_steps = self._encode_values(rows.values, rows.keep)
        return rows.replacing(keys=key_codes, values=value_codes, key_steps=key_steps, value_steps=value_steps)

    def replace_values(self, values: Float[Tensor, "b h n e"]) -> None:
        """Give the kept rows other values, as numbers."""
        everything = torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
        for part, content in zip(("values", STEPS[1]), self._encode_values(values, everything), strict=True):
            self.pool.replace(part, content)

    def _encode_values(self, values: Float[Tensor, "b h n e"], keep: Bool[Tensor, "b h n"]) -> tuple[Tensor, Tensor]:
        return _encoded(values, keep, self.format.value_bits, self.format.group_of(self.value_dim))

    def decode(self, rows: Rows) -> Rows:
        """Codes as the numbers they stand for; of keys and values those that the rows have."""
        numbers = {}
        for name, bits, dim in self._sides:
            if name in rows.parts:
                turned = decode(rows.parts[name], rows.parts[_STEPS_OF[name]], bits)
                numbers[name] = (turned @ hadamard(dim, turned.device).T).to(self.dtype)
        return rows.without(*STEPS).replacing(**numbers)

    def spans(self) -> list[Float[Tensor, "b h n"]]:
        """How far the numbers of each kept key, and of each value, lie apart, rotated."""
        found = []
        for name, bits, _ in self._sides:
            steps = self.pool.kept(_STEPS_OF[name])
            assert steps is not None
            found.append((2**bits - 1) * steps.float().chunk(2, dim=-1)[0].amax(dim=-1))
        return found

    @property
    def _sides(self) -> tuple[tuple[str, int, int], tuple[str, int, int]]:
        """Name, bits and channels of keys, then of values."""
        return ("keys", self.format.key_bits, self.key_dim), ("values", self.format.value_bits, self.value_dim)


def with_steps(names: Sequence[str]) -> tuple[str, ...]:
    """Those parts of rows, and what else has to be read of codes to have them as numbers; none stands for all."""
    return (*names, *(steps for name, steps in _STEPS_OF.items() if name in names))


def old_rows(
    precision: Precision, formats: Int[Tensor, "b h"], rank: Int[Tensor, "b h n"], lengths: Int[Tensor, "b h 1"]
) -> Bool[Tensor, "b h n"]:
    """Rows that are codes or should be, by their order among the rows of their head.

    Args:
        formats: of each head, -1 for one that stays exact.
    """
    inside = (rank >= precision.sinks) & (rank < lengths - precision.recent)
    return inside & (formats >= 0)[:, :, None]


def encode_old(
    precision: Precision, formats: Int[Tensor, "b h"], exact: PagePool, coded: Sequence[CodedPages], decided: int
) -> None:
    """Write exact rows that have grown old down as codes.

    Args:
        decided: columns from the first on whose rows have been given their format, and keep it.
    """
    old = _old_in_pool(precision, formats, exact, decided)
    if not bool(old.any()):
        return
    rows = exact.gather(old)
    if precision.later is not None:
        formats = torch.full_like(formats, precision.later)
    for part, arriving in zip(coded, _encoded_by_format(rows, formats[:, :, None], coded), strict=True):
        if arriving is not None:
            part.pool.commit(part.pool.occupied(), arriving)
    exact.drop(~old)


def recode(
    keep: Sequence[Bool[Tensor, "b h _"]],
    formats: Sequence[Int[Tensor, "b h _"]],
    exact: PagePool,
    coded: Sequence[CodedPages],
    spare: int,
) -> None:
    """Keep those rows, each in the format given: the one that it has, or one of fewer bits.

    Args:
        keep, formats: of the exact rows, then of those in each format; formats by index, -1 for exact.
        spare: exact rows per head that are going to be appended.
    """
    stays = [own & (wanted == now) for now, (own, wanted) in enumerate(zip(keep, formats, strict=True), start=-1)]
    falls = [own & ~same for own, same in zip(keep, stays, strict=True)]
    moving: list[tuple[Rows, Tensor]] = []
    for now, (gone, wanted) in enumerate(zip(falls, formats, strict=True), start=-1):
        if bool(gone.any()):
            rows = exact.gather(gone) if now < 0 else coded[now].decode(coded[now].pool.gather(gone))
            # Listed head by head on both sides.
            into = torch.full_like(rows.keep, -1, dtype=wanted.dtype)
            into[rows.keep] = wanted[gone]
            moving.append((rows, into))
    coming: list[Rows | None] = [None] * len(coded)
    if moving:
        rows, into = side_by_side([rows for rows, _ in moving]), torch.cat([into for _, into in moving], dim=-1)
        coming = _encoded_by_format(rows, into, coded)
    exact.drop(stays[0], spare)
    for part, same, arriving in zip(coded, stays[1:], coming, strict=True):
        if arriving is None:
            part.pool.drop(same)
        else:
            part.pool.commit(same, arriving)


def _encoded_by_format(rows: Rows, formats: Int[Tensor, "b h #n"], coded: Sequence[CodedPages]) -> list[Rows | None]:
    """The rows that go into each format, as its codes; None for a format that none goes into."""
    named = by_format(rows.keep, formats, len(coded))
    return [part.encode(rows.naming(own)) if bool(own.any()) else None for part, own in zip(coded, named, strict=True)]


def _old_in_pool(
    precision: Precision, formats: Int[Tensor, "b h"], exact: PagePool, decided: int
) -> Bool[Tensor, "b h n"]:
    """Rows among the exact ones that should be codes, by their columns."""
    occupied, columns = exact.occupied(), exact.kept("columns")
    assert columns is not None
    columns = columns.masked_fill(~occupied, torch.iinfo(torch.int32).max)
    rank = columns.argsort(dim=-1).argsort(dim=-1)
    return old_rows(precision, formats, rank, exact.lengths[:, :, None]) & occupied & (columns >= decided)


def by_format(rows: Bool[Tensor, "b h n"], formats: Int[Tensor, "b h #n"], count: int) -> list[Bool[Tensor, "b h n"]]:
    """Which of the rows go into each of so many formats: each into its own, or all of a head into one."""
    return [rows & (formats == index) for index in range(count)]


def _encoded(
    numbers: Float[Tensor, "b h n d"], keep: Bool[Tensor, "b h n"], bits: int, group: int
) -> tuple[Tensor, Tensor]:
    """Codes of the numbers of those rows, and the steps they are read by; of other rows they are undefined."""
    codes, steps = [], []
    for block in numbers[keep].split(_BLOCK):
        turned = block.float() @ hadamard(block.shape[-1], block.device)
        coded = encode(within(turned, STEP_DTYPE, "rows that become codes", _UNCODED), bits, group)
        codes.append(coded[0])
        steps.append(coded[1])
    return _spread(torch.cat(codes), keep), _spread(torch.cat(steps), keep)


def _spread(rows: Tensor, keep: Bool[Tensor, "b h n"]) -> Tensor:
    """Rows that were picked, in their places again."""
    found = rows.new_empty(*keep.shape, rows.shape[-1])
    found[keep] = rows
    return found
