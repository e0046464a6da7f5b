"""Choice: what layers were asked and hold of a prompt -> the rows of every KV head that fill its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headwise.gate.gate import LayerGate
from headwise.hosts.vllm.options import Options
from headwise.hosts.vllm.whole_pages import pages_of_heads, rows_in_pages
from headwise.kernels.backends import AUTO, REFERENCE, choose
from headwise.kernels.interface import AttentionMap
from headwise.policies.choice import FormatLoss, PromptSummary
from headwise.stages.config import CacheConfig, LayerConfig
from headwise.stages.mass_profile import MassProfile
from headwise.stages.plan import make_plans, summarise
from headwise.stages.profile import Observations
from headwise.stages.token_log import TokenLog
from headwise.types import Float, Int, LogitOptions, Rotation, Tensor, UInt8


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


@dataclass
class Asked:
    """What a layer was asked while a prompt is read.

    Attributes:
        queries: the newest, as many as the policy looks at.
        mass: attention that every column got, where the policy looks at that.
    """

    queries: Float[Tensor, "1 h g q d"] | None = None
    mass: MassProfile | None = None


@dataclass(frozen=True)
class Known:
    """What is known of a model and of a prompt, beside what its layers compute.

    Attributes:
        kinds: of the prompt's tokens, where the policy looks at them.
        rotation, gate: of the layer, where the policy looks through them.
        layer, layers: index of the layer, and how many share what stays.
    """

    kinds: UInt8[Tensor, "1 t"] | None = None
    rotation: Rotation | None = None
    gate: LayerGate | None = None
    layer: int = 0
    layers: int = 1


def needs_mass(options: Options) -> bool:
    """Whether the policy looks at the attention that every column got from all queries."""
    policy = options.keeping(1)
    return policy.selection is not None or "score" in policy.facts


def mass_of(
    options: Options,
    blocks: PromptBlocks,
    queries: Float[Tensor, "1 h g q d"],
    keys: Float[Tensor, "1 h t d"],
    logits: LogitOptions,
) -> MassProfile:
    """Attention that every column got from the queries of a pass.

    Args:
        keys: of all tokens so far.
    """
    observed = _observations(options, blocks, keys, Known())[0]
    observed.observe(AttentionMap(queries, keys, None, logits))
    assert observed.mass.profile is not None
    return observed.mass.profile


def summary_of(
    options: Options,
    blocks: PromptBlocks,
    asked: Asked,
    keys: Float[Tensor, "1 h t d"],
    values: Float[Tensor, "1 h t e"],
    logits: LogitOptions,
    known: Known,
) -> PromptSummary:
    """What is known of a layer at the end of a prompt, to choose by."""
    policy = options.keeping(blocks.rows)
    observed, log = _observations(options, blocks, keys, known)
    assessed: tuple[Tensor | None, FormatLoss | None] = (None, None)
    if policy.needs_evidence:
        assert asked.queries is not None
        observed.asked.add(AttentionMap(asked.queries, keys, None, logits), None)
        assessed = policy.assess(observed.evidence(keys, values))
    columns = torch.arange(blocks.tokens, device=keys.device).expand(1, keys.shape[1], -1)
    valid = torch.ones_like(columns, dtype=torch.bool)
    mass = None if asked.mass is None else asked.mass.score
    facts = log.facts(columns, valid, mass, blocks.tokens, None, known.layer, known.layers)
    # What does not fill a block stays in any case, and counts.
    return summarise(policy, replace(facts, pinned=columns >= blocks.candidates), asked.mass, assessed)


def choose_rows(
    options: Options, blocks: PromptBlocks, layers: Sequence[PromptSummary]
) -> list[list[Int[Tensor, " rows"]]]:
    """Rows of each head of each layer among the candidates, in order, in whole pages.

    Args:
        layers: one, or all of them where they share what stays.
    """
    policy = options.keeping(blocks.rows)
    keeps = [plan.keep[0, :, : blocks.candidates] for plan in make_plans(policy, layers)]
    kept = torch.cat([keep.sum(dim=1) for keep in keeps])
    pages = pages_of_heads(kept, blocks.stay * len(kept), blocks.whole).split([len(keep) for keep in keeps])
    found = []
    for layer, keep, own in zip(layers, keeps, pages, strict=True):
        worth = layer.tokens.score if layer.score is None else layer.score
        score = None if worth is None else worth[0, :, : blocks.candidates]
        found.append(rows_in_pages(keep, score, own, blocks.size))
    return found


def _observations(
    options: Options, blocks: PromptBlocks, keys: Float[Tensor, "1 h t d"], known: Known
) -> tuple[Observations, TokenLog]:
    """What looks at so many tokens of a prompt, and the log of them."""
    # All attention is a second prefill, and compiled kernels are made for it.
    kernels = choose(AUTO if needs_mass(options) else REFERENCE, keys.device, keys.dtype)
    cache = CacheConfig(kernels, prompt_columns=blocks.tokens)
    gate = None if known.gate is None else known.gate.to(keys.device)
    kinds = None if known.kinds is None else known.kinds.to(keys.device)
    config = LayerConfig(0, options.keeping(blocks.rows), cache, known.rotation, gate)
    log = TokenLog(needs_kinds=kinds is not None)
    log.announce(kinds)
    log.extend(1, keys.shape[2], None, keys.device)
    return Observations(config, log), log


def query_rows(options: Options) -> int | None:
    """How many of the newest queries the policy looks at; None for all of them."""
    policy = options.keeping(1)
    return policy.query_rows if policy.needs_evidence else 0
