"""Quantized: a policy and numbers of bits -> the same policy, with older rows stored in so few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headwise.errors import ConfigurationError
from headwise.policies.base import Policy
from headwise.policies.checks import check_count
from headwise.policies.wrapper import Wrapper
from headwise.quant.formats import BITS, RECENT, SINKS, Precision, RowFormat


@dataclass(frozen=True)
class Quantized(Wrapper):
    """Keeps what another policy keeps, and stores all but the newest and the first of it as codes of 8 or 4 bits.

    Every row is rotated and then coded by its own smallest and largest number; see docs/quantization.md for what was
    compared. Kernels read the codes where they lie. A head whose keys or values would suffer too much, as in models
    with large biases, gets 8 bits for them or stays exact; a warning says so, and `report().formats` which.

    Args:
        policy: what decides which rows stay; `Full()` for all.
        key_bits: of a code, 4 or 8.
        value_bits: the same for values; None for as many as keys have.
        group: channels that share a step; None for a whole head. Smaller groups are more exact and take more bytes.
        recent: newest rows of a head that stay exact.
        sinks: first rows of a head that stay exact.

    Raises:
        ConfigurationError: when the policy is none or quantized already, or a number is out of range.
    """

    name: ClassVar[str] = "quantized"

    key_bits: int = 4
    value_bits: int | None = None
    group: int | None = None
    recent: int = RECENT
    sinks: int = SINKS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy.precision is not None:
            raise ConfigurationError(f"{self.policy.name} chooses the bits itself; Quantized cannot wrap it")
        check_count("recent", self.recent, 0)
        check_count("sinks", self.sinks, 0)
        _ = self.format

    def __str__(self) -> str:
        """How Python would build it, without what is left at its default."""
        names = ("key_bits", "value_bits", "group", "recent", "sinks")
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) != getattr(Quantized, name)]
        return f"Quantized({', '.join([str(self.policy), *given])})"

    @property
    def title(self) -> str:
        """The policy's, in so many bits."""
        plain = self.format == RowFormat(self.key_bits, self.key_bits)
        bits = f"{self.key_bits} bits" if plain else str(self.format)
        return f"{self.policy.title} in {bits}"

    @property
    def format(self) -> RowFormat:
        """Of the rows that are not exact."""
        return RowFormat(self.key_bits, self.value_bits or self.key_bits, self.group)

    @property
    def precision(self) -> Precision:
        """One format for all heads but those that it would damage."""
        return Precision(self.format.finer, self.recent, self.sinks, adapts=True)


def quantized(policy: Policy, text: str) -> Quantized:
    """The policy with bits as words say: int8, int4, or apart for keys and values, such as k8v4.

    Raises:
        ConfigurationError: when the text is none of those.
    """
    most_first = sorted(BITS, reverse=True)
    alike = {f"int{bits}": (bits, None) for bits in most_first}
    apart = {f"k{keys}v{values}": (keys, values) for keys in most_first for values in most_first if keys != values}
    accepted = alike | apart | {f"k{bits}v{bits}": (bits, None) for bits in most_first}
    found = accepted.get(text.strip().lower())
    if found is None:
        *others, last = alike | apart
        raise ConfigurationError(f"bits are {', '.join(others)} or {last}, got {text!r}")
    return Quantized(policy, *found)
