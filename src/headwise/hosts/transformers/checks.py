"""Checks: the options of a cache -> nothing, or an error that says what would do, or what is doubtful about them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.kernels import AUTO, REFERENCE, obstacle
from headwise.policies.base import Policy
from headwise.policies.less import Less
from headwise.policies.scored import Scored
from headwise.policies.wrapper import wrappers

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


def doubts(policy: Policy, model: PreTrainedModel, asked: str, kernel: str) -> Iterator[str]:
    """What works, but perhaps not as meant.

    Args:
        policy: kernels of LESS in it are loaded.
        asked, kernel: names of the attention kernels that were asked for, and of those that are going to run.
    """
    if any(isinstance(wrapper, Less) and not wrapper.trained for wrapper in wrappers(policy)):
        yield (
            f"the kernels of LESS were not trained with what {policy.chooser} evicts; `headwise train-less` can do that"
        )
    if asked == AUTO and kernel == REFERENCE:
        reason = obstacle("cpu" if model.device.type == "cpu" else "triton", model.device, model.dtype)
        yield (
            f"running the plain torch kernels, which are several times slower: {reason}; "
            'ask for kernel="reference" where this is meant'
        )
