"""Budget: tokens, a share or bytes, and a model -> the policy with room for so much."""

from __future__ import annotations

from typing import Any

import torch

from headwise.errors import ConfigurationError
from headwise.policies.base import Policy
from headwise.policies.size import Size
from headwise.store.rows import COLUMN_BYTES
from headwise.units import parse_bytes

# What a row holds beside key, value and column where a rule ranks while generating.
_SCORE_BYTES = torch.float32.itemsize


def with_budget(policy: Policy, budget: int | float | str, config: Any, dtype: torch.dtype) -> Policy:
    """The policy with a budget for the rows of one sequence.

    Args:
        budget: tokens per KV head (int), a fraction of the prompt (float), or bytes as text, such as "64MiB".
        config: of the model.

    Raises:
        ConfigurationError: when the policy takes no budget, it is out of range, or too small for a token.
    """
    if isinstance(budget, str):
        in_bytes = policy.with_bytes(parse_bytes(budget))
        return policy.with_keep(_tokens(policy, budget, config, dtype)) if in_bytes is None else in_bytes
    return policy.with_keep(budget)


def row_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers; only an estimate where layers differ."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim(config) * dtype.itemsize)


def head_dim(config: Any) -> int:
    """Channels of a head, as the configuration says or lets infer."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _tokens(policy: Policy, text: str, config: Any, dtype: torch.dtype) -> Size:
    heads: int = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    scored = any("score" in rule.reads for rule in policy.rungs)
    score = heads * (_SCORE_BYTES if scored else 0)
    per_token = row_bytes(config, dtype) + heads * COLUMN_BYTES + score
    room = parse_bytes(text)
    tokens = room // per_token
    if policy.precision is not None and tokens > policy.precision.exact:
        dim = head_dim(config)
        exact, (format, *_) = policy.precision.exact, policy.precision.formats
        tokens = exact + (room - exact * per_token) // (heads * format.row_bytes(dim, dim) + score)
    if tokens < 1:
        raise ConfigurationError(f"{text} is less than one token per KV head takes, which is {per_token} bytes")
    return tokens
