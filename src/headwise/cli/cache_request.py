"""Cache request: options about policy and cache -> a request, checked before any model is loaded -> the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headwise.cli.loading import check_kernel, parse_dtype
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.hosts.transformers.cache import HeadwiseCache
    from headwise.policies import Policy
    from headwise.steer.steering import BaseSteering

# What says how much Auto is to keep.
_SIZES = ("recovery=", "ratio=", "bytes=")


@dataclass(frozen=True)
class CacheRequest:
    """What a `HeadwiseCache` is made of, beside the model.

    Attributes:
        budget: room for the prompt; None for what the policy says.
        rows: dtype of exact rows; None for the model's.
        recommended: whether nobody asked for the policy, so that it is fitted to the model: gates where there are some
            for it, and no matching where its positions are not known.
    """

    policy: Policy
    budget: int | float | str | None
    kernel: str
    rows: torch.dtype | None
    evict_every: int
    recommended: bool = False

    def make(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int | None = None,
        steering: BaseSteering | None = None,
    ) -> HeadwiseCache:
        """The cache.

        Args:
            prompt_tokens: where the prompt comes in pieces, of how many tokens it is.
            steering: how attention is drawn to what is marked.
        """
        if not self.recommended:
            return self._make(model, self.policy, tokenizer, prompt_tokens, steering)
        from headwise.errors import UnsupportedModelError
        from headwise.policies.recommended import by_gates, unmatched

        policy = by_gates(self.policy, model)
        try:
            return self._make(model, policy, tokenizer, prompt_tokens, steering)
        except UnsupportedModelError:
            return self._make(model, unmatched(policy), tokenizer, prompt_tokens, steering)

    def _make(
        self,
        model: PreTrainedModel,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int | None,
        steering: BaseSteering | None,
    ) -> HeadwiseCache:
        from headwise.hosts.transformers.cache import HeadwiseCache

        return HeadwiseCache(
            model,
            policy,
            tokenizer=tokenizer,
            prompt_tokens=prompt_tokens,
            kernel=self.kernel,
            evict_every=self.evict_every,
            budget=self.budget,
            cache_dtype=self.rows,
            steering=steering,
        )


def read_cache_request(
    policy: str | None,
    recovery: float | None = None,
    settings: Sequence[str] | None = None,
    budget: str | None = None,
    bits: str | None = None,
    less: bool = False,
    less_kernels: Path | None = None,
    match: bool = False,
    kernel: str = "auto",
    cache_dtype: str = "auto",
    evict_every: int = 16,
    *,
    set_apart: bool = True,
) -> CacheRequest:
    """The options of the command line, in their own types.

    Where no policy is named it is `Match(Auto(ratio=0.25))`, without `Match` where LESS is asked for.

    Kernels of LESS are read here, before any model is.

    Args:
        set_apart: whether parameters can be given beside the policy's name; complaints say how they are.

    Raises:
        ConfigurationError: for a word or number that cannot be.
        InputError: when there are no kernels of LESS in the folder, or none came with headwise.
    """
    from headwise.policies.words import build_policy, in_bits, matched, parse_policy, read_budget, remembering

    # Who says whether there are to be gates is not asked again.
    recommended = policy is None and not any(s.startswith("gate=") for s in settings or ())
    in_words = policy is not None and (not set_apart or ":" in policy or "+" in policy)
    if policy is None:
        policy, match = "auto", not (less or less_kernels is not None)
        sized = recovery is not None or budget is not None or any(s.startswith(_SIZES) for s in settings or ())
        settings = [*(settings or ()), *([] if sized else ["ratio=0.25"])]
    if in_words:
        if settings or recovery is not None:
            raise ConfigurationError(
                f"--policy {policy} says its parameters itself; --set and --recovery go with a name"
            )
        chosen = parse_policy(policy, budgeted=budget is not None)
    else:
        chosen = build_policy(policy, recovery, settings or (), budgeted=budget is not None)
    if bits is not None:
        chosen = in_bits(chosen, bits)
    if less or less_kernels is not None:
        chosen = remembering(chosen, "" if less_kernels is None else str(less_kernels)).read()
    if match:
        chosen = matched(chosen)
    room = None if budget is None else read_budget(budget)
    check_kernel(kernel)
    return CacheRequest(chosen, room, kernel, parse_dtype(cache_dtype), evict_every, recommended)
