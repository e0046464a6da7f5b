"""Formats: how many bits a row's numbers get, and which rows stay exact; checked against a model's dimensions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from headwise.errors import ConfigurationError

BITS = (4, 8)

# Rows of a head that stay exact unless told otherwise: the newest and the first.
RECENT, SINKS = 16, 4


@dataclass(frozen=True)
class RowFormat:
    """How a row is stored as codes.

    Attributes:
        key_bits, value_bits: of the code of a number, 4 or 8.
        group: channels that share a step and a least number; None for all of a head.

    Raises:
        ConfigurationError: for other numbers of bits, or a group of no channels.
    """

    key_bits: int
    value_bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if isinstance(bits, bool) or bits not in BITS:
                raise ConfigurationError(f"{name} must be {' or '.join(map(str, BITS))}, got {bits!r}")
        if self.group is not None:
            _check_group(self.group)

    def __str__(self) -> str:
        """As in the literature: K4V4."""
        return f"K{self.key_bits}V{self.value_bits}" + (f"G{self.group}" if self.group else "")

    def group_of(self, dim: int) -> int:
        """Channels in a group of a head with so many.

        Raises:
            ConfigurationError: when they do not divide, or an odd number of codes would have to share bytes.
        """
        group = self.group or dim
        if dim % group:
            raise ConfigurationError(f"a head of {dim} channels cannot be cut into groups of {group}")
        if dim % 2 and 4 in (self.key_bits, self.value_bits):
            raise ConfigurationError(f"codes of 4 bits come in pairs, and a head has {dim} channels; take 8 bits")
        return group

    @property
    def finer(self) -> tuple[RowFormat, ...]:
        """Those of the same group in which nothing has fewer bits, this one first."""
        pairs = product((b for b in BITS if b >= self.key_bits), (b for b in BITS if b >= self.value_bits))
        return tuple(replace(self, key_bits=keys, value_bits=values) for keys, values in pairs)


@dataclass(frozen=True)
class Precision:
    """Which rows of a cache are stored as codes, and how.

    Attributes:
        formats: that a head may get.
        recent: newest rows of every head that stay exact.
        sinks: first rows of every head that stay exact: attention sinks, whose keys are unlike all others, and in
            which small errors move much attention (KVQuant, Hooper et al., NeurIPS 2024, section 3.5).
        later: number of the format of rows that come after the prompt; None for that of their head.
        adapts: whether a head that the first format would damage gets another, or stays exact.
    """

    formats: tuple[RowFormat, ...]
    recent: int = RECENT
    sinks: int = SINKS
    later: int | None = None
    adapts: bool = False

    @property
    def bits(self) -> frozenset[int]:
        """Of all codes."""
        return frozenset(bits for format in self.formats for bits in (format.key_bits, format.value_bits))

    @property
    def exact(self) -> int:
        """Rows of a head that are not stored as codes."""
        return self.recent + self.sinks


def _check_group(group: int) -> None:
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ConfigurationError(f"group must be a count of channels, got {group!r}")
