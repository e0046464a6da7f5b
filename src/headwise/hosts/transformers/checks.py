"""Checks: the options of a cache -> nothing, or an error that says what would do, or what is doubtful about them."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from headwise.contract import ModelFacts
from headwise.errors import ConfigurationError, UnsupportedModelError
from headwise.kernels.backends import AUTO, REFERENCE, obstacle
from headwise.policies.base import Policy
from headwise.policies.checks import check_count
from headwise.policies.less import Less
from headwise.policies.wrapper import wrappers


def check_options(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt_tokens: int | None,
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
    if chooser.needs_repetition and tokenizer is None:
        raise ConfigurationError(
            f"{type(chooser).__name__} asks the model to repeat its prompt and needs a tokenizer: "
            "HeadwiseCache(model, policy, tokenizer=tokenizer)"
        )
    if prompt_tokens is not None:
        check_count("prompt_tokens", prompt_tokens, 1)


def keeps_all(policy: Policy) -> bool:
    """Whether nothing is ever dropped, whatever the prompt."""
    return all(rung.keeps_all for rung in policy.chooser.rungs)


def check_model(facts: ModelFacts, policy: Policy, kinds: list[str]) -> None:
    """Refuse a model of which nothing can be compressed, unless nothing is to be.

    Args:
        kinds: names of the model's cache layers.

    Raises:
        UnsupportedModelError: saying what layers it has.
    """
    if keeps_all(policy) or any(layer.compressed for layer in facts.layers):
        return
    said = _obstacles(facts) or f"all of its {len(kinds)} layers are {', '.join(sorted(set(kinds)))}"
    raise UnsupportedModelError(
        f"{facts.name} has nothing to compress: {said}; headwise compresses layers of full attention that goes through "
        "transformers' attention interface"
    )


def doubts(policy: Policy, facts: ModelFacts, asked: str, kernel: str) -> Iterator[str]:
    """What works, but perhaps not as meant.

    Args:
        policy: kernels of LESS in it are loaded.
        asked, kernel: names of the attention kernels that were asked for, and of those that are going to run.
    """
    if any(isinstance(wrapper, Less) and not wrapper.trained for wrapper in wrappers(policy)):
        yield (
            f"the kernels of LESS were not trained with what {policy.chooser} evicts; `headwise train-less` can do that"
        )
    if not keeps_all(policy) and (said := _obstacles(facts)):
        yield f"some layers of full attention keep transformers' own cache: {said}"
    if asked == AUTO and kernel == REFERENCE:
        reason = obstacle(
            "cpu" if facts.device.type == "cpu" else "triton", facts.device, facts.dtype, policy.precision
        )
        yield (
            f"running the plain torch kernels, which are several times slower: {reason}; "
            'ask for kernel="reference" where this is meant'
        )


def _obstacles(facts: ModelFacts) -> str:
    """Why layers of full attention are not compressed, once for each reason."""
    found: dict[str, int] = {}
    for index, layer in enumerate(facts.layers):
        if layer.obstacle is not None:
            found.setdefault(layer.obstacle, index)
    return "; ".join(f"layer {index}: {obstacle}" for obstacle, index in found.items())
