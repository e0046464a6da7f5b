"""Checks: the options of a cache -> nothing, or an error that says what would do."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.policies.base import Policy
from headwise.policies.scored import Scored

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_options(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase | None,
    page_size: int,
    prompt_tokens: int | None,
    evict_every: int,
    cache_dtype: torch.dtype | None,
) -> None:
    """Refuse what a cache cannot be made with.

    Raises:
        ConfigurationError: when the policy is none or needs a tokenizer and has none, or an option is out of range.
    """
    if not isinstance(policy, Policy):
        raise ConfigurationError(f"policy must be a headwise policy such as FastGen(recovery=0.95), got {policy!r}")
    chooser = policy.chooser
    if "kind" in chooser.facts and tokenizer is None:
        raise ConfigurationError(
            f"{type(chooser).__name__} looks at the kind of each token (special, punctuation) and needs a tokenizer: "
            "HeadwiseCache(model, policy, tokenizer=tokenizer)"
        )
    if isinstance(chooser, Scored) and chooser.reconstructs and tokenizer is None:
        raise ConfigurationError(
            f"{type(chooser).__name__} asks the model to repeat its prompt and needs a tokenizer: "
            "HeadwiseCache(model, policy, tokenizer=tokenizer)"
        )
    counts = {"page_size": page_size, "prompt_tokens": prompt_tokens, "evict_every": evict_every}
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigurationError(f"{name} must be a count of 1 or more, got {value!r}")
    if cache_dtype not in (None, *_DTYPES):
        raise ConfigurationError(f"cache_dtype must be one of {', '.join(map(str, _DTYPES))}, got {cache_dtype!r}")
