"""Budget: tokens, a share or bytes, and the layers that are compressed -> the policy with room for so much."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.contract import LayerShape
from headwise.errors import ConfigurationError
from headwise.policies.base import Policy
from headwise.policies.size import Size
from headwise.policies.wrapper import wrappers
from headwise.quant.formats import RowFormat
from headwise.store.row_parts import row_bytes, row_parts
from headwise.units import parse_bytes


def with_budget(policy: Policy, budget: int | float | str, layers: Sequence[LayerShape], dtype: torch.dtype) -> Policy:
    """The policy with a budget for the rows of one sequence.

    Args:
        budget: tokens per KV head (int), a fraction of the prompt (float), or bytes as text, such as "64MiB".
        layers: that are compressed; the bytes are theirs.
        dtype: of exact rows.

    Raises:
        ConfigurationError: when the policy takes no budget, it is out of range, or too small for a token.
    """
    if not isinstance(budget, str):
        return policy.with_keep(budget)
    room = parse_bytes(budget)
    in_bytes = policy.with_bytes(room)
    return policy.with_keep(_tokens(policy, budget, room, layers, dtype)) if in_bytes is None else in_bytes


def _tokens(policy: Policy, text: str, room: int, layers: Sequence[LayerShape], dtype: torch.dtype) -> Size:
    """Tokens per KV head that fit into the room."""
    if not layers:
        raise ConfigurationError(f"{text} cannot be turned into tokens: no layer with a known shape is compressed")
    scored, precision = "score" in policy.facts, policy.precision
    biased = any(wrapper.biased for wrapper in wrappers(policy))

    def bytes_of(format: RowFormat | None = None) -> int:
        return sum(
            layer.heads
            * row_bytes(row_parts(layer.key_dim, layer.value_dim, dtype, format, scored=scored, biased=biased))
            for layer in layers
        )

    exact = bytes_of()
    tokens = room // exact
    if precision is not None and tokens > precision.exact:
        tokens = precision.exact + (room - precision.exact * exact) // bytes_of(precision.formats[0])
    if tokens < 1:
        raise ConfigurationError(f"{text} is less than one token per KV head takes, which is {exact} bytes")
    return tokens
