"""Choice: queries, keys and values of a prompt in one layer -> the rows of every KV head that fill its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headwise.hosts.vllm.options import Options
from headwise.hosts.vllm.whole_pages import pages_of_heads, rows_in_pages
from headwise.kernels.backends import REFERENCE, choose
from headwise.kernels.interface import AttentionMap
from headwise.stages.config import CacheConfig, LayerConfig
from headwise.stages.plan import make_plans, summarise
from headwise.stages.profile import Observations
from headwise.stages.token_log import TokenLog
from headwise.types import Float, Int, LogitOptions, Rotation, Tensor


@dataclass(frozen=True)
class PromptBlocks:
    """A prompt in blocks.

    Attributes:
        tokens: of the prompt.
        size: tokens in a block.
        whole: blocks that it fills; what does not fill one stays where it is.
        stay: of these, how many are left.
    """

    tokens: int
    size: int
    whole: int
    stay: int

    @classmethod
    def of(cls, options: Options, tokens: int, size: int) -> PromptBlocks:
        """Of a request."""
        return cls(tokens, size, *options.blocks(tokens, size))

    @property
    def candidates(self) -> int:
        """Tokens in whole blocks, of which is chosen."""
        return self.whole * self.size

    @property
    def rows(self) -> int:
        """Rows of a head that stay, as a mean over the heads of a layer."""
        return self.tokens - self.candidates + self.stay * self.size


def choose_rows(
    options: Options,
    blocks: PromptBlocks,
    queries: Float[Tensor, "1 h g q d"],
    keys: Float[Tensor, "1 h t d"],
    values: Float[Tensor, "1 h t e"],
    logits: LogitOptions,
    rotation: Rotation | None,
) -> Sequence[Int[Tensor, " rows"]]:
    """Rows of each head among the candidates, in order, in whole pages.

    Args:
        queries: the newest, as many as the policy looks at.
    """
    policy = options.keeping(blocks.rows)
    cache = CacheConfig(choose(REFERENCE, keys.device, keys.dtype), prompt_columns=blocks.tokens)
    config, log = LayerConfig(0, policy, cache, rotation), TokenLog(needs_kinds=False)
    log.extend(1, blocks.tokens, None, keys.device)
    observed = Observations(config, log)
    observed.asked.add(AttentionMap(queries, keys, None, logits), None)
    assessed = policy.assess(observed.evidence(keys, values)) if policy.needs_evidence else (None, None)
    columns = torch.arange(blocks.tokens, device=keys.device).expand(1, keys.shape[1], -1)
    valid = torch.ones_like(columns, dtype=torch.bool)
    facts = log.facts(columns, valid, None, blocks.tokens, None, 0, 1)
    # What does not fill a block stays in any case, and counts.
    summary = summarise(policy, replace(facts, pinned=columns >= blocks.candidates), None, assessed)
    keep = make_plans(policy, [summary])[0].keep[0, :, : blocks.candidates]
    score = None if summary.score is None else summary.score[0, :, : blocks.candidates]
    pages = pages_of_heads(keep.sum(dim=1), blocks.stay * keep.shape[0], blocks.whole)
    return rows_in_pages(keep, score, pages, blocks.size)


def query_rows(options: Options) -> int | None:
    """How many of the newest queries the policy looks at; None for all of them."""
    policy = options.keeping(1)
    return policy.query_rows if policy.needs_evidence else 0
