"""Row parts: how rows are stored -> what a row consists of, in order: the one list that says so.

Whatever moves, copies, saves or counts rows does it with every part in the list. A further part of a row is a further
line here, with what a new row has of it; where kernels read it, also a field of `headwise.kernels.interface.PageView`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from headwise.quant.codes import STEP_DTYPE
from headwise.quant.formats import RowFormat

# What tells how the codes of a row are read.
STEPS = ("key_steps", "value_steps")


@dataclass(frozen=True)
class RowPart:
    """One part of a row.

    Attributes:
        name: of the part, in pools, in kernels and in saved caches.
        shape: of what a row has of it.
        fresh: what a row has of it that comes without; None where no row does, as kernels write it.
        appended: whether kernels write the fresh one with the rows that they append.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fresh: float | None = None
    appended: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of one row's."""
        return math.prod(self.shape) * self.dtype.itemsize


# Beside key and value, in any format.
COLUMN = RowPart("columns", (), torch.int32)
SCORE = RowPart("scores", (), torch.float32)
# What is added to the logits of a row.
BIAS = RowPart("biases", (), torch.float16, fresh=0.0, appended=True)


def row_parts(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    format: RowFormat | None = None,
    *,
    scored: bool = False,
    biased: bool = False,
) -> tuple[RowPart, ...]:
    """The parts of a row.

    Args:
        key_dim, value_dim: channels of a key and of a value.
        dtype: of exact rows.
        format: of rows that are codes; None for exact ones.
        scored: whether rows carry an accumulated score.
        biased: whether their logits have a bias.

    Raises:
        ConfigurationError: when the format does not suit the head dimensions.
    """
    if format is None:
        numbers = [RowPart("keys", (key_dim,), dtype), RowPart("values", (value_dim,), dtype)]
        steps = []
    else:
        sides = zip((key_dim, value_dim), (format.key_bits, format.value_bits), strict=True)
        codes = [dim * bits // 8 for dim, bits in sides]
        groups = [dim // format.group_of(dim) for dim in (key_dim, value_dim)]
        numbers = [RowPart(name, (count,), torch.uint8) for name, count in zip(("keys", "values"), codes, strict=True)]
        # Of each group a step and a least number.
        steps = [RowPart(name, (2 * count,), STEP_DTYPE) for name, count in zip(STEPS, groups, strict=True)]
    return (
        *numbers,
        COLUMN,
        *([SCORE] if scored else []),
        *([BIAS] if biased else []),
        *steps,
    )


def row_bytes(parts: tuple[RowPart, ...]) -> int:
    """Bytes of a row."""
    return sum(part.nbytes for part in parts)


# Every part that a row may have.
PART_NAMES = tuple(
    dict.fromkeys(
        part.name
        for format in (None, RowFormat(8, 8))
        for part in row_parts(8, 8, torch.float32, format, scored=True, biased=True)
    )
)
