"""R-KV: the tokens that the newest ones look at, unless later tokens say the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from headwise.errors import ConfigurationError
from headwise.policies.checks import check_count
from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import Scored, by_position, newest_first
from headwise.policies.size import Size
from headwise.types import Float, Tensor

# Similarities in flight at a time: in fp32 they take 16 MiB.
_BLOCK = 2**22


@register("rkv")
@dataclass(frozen=True)
class RKV(Scored):
    """Keeps what the newest tokens look at and what no later token repeats (Cai et al., 2025, section 3).

    arXiv 2505.24133, made for long reasoning, which repeats itself. A token is as important as the most that the
    queries of a group pay to it or its neighbours, on average over the newest ones. It is as redundant as its key is
    similar to the others, as a softmax over all of them; of tokens that say nearly the same, the newest do not count as
    redundant. The newest tokens are kept.

    Args:
        keep: tokens per KV head: a count (int), or a fraction (float).
        window: newest tokens that vote, alpha of the paper, and are kept.
        kernel: neighbours over which the largest attention counts, an odd number; 1 for none.
        weight: of importance against redundancy, lambda of the paper.
        alike: cosine between two keys from which on they say nearly the same.
        spared: of the tokens that are alike, so many of the newest are not redundant, beta of the paper.
    """

    keep: Size
    window: int = 8
    kernel: int = 7
    weight: float = 0.1
    alike: float = 0.5
    spared: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        check_count("kernel", self.kernel, 1, odd=True)
        check_count("spared", self.spared, 0)
        for name in ("weight", "alike"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigurationError(f"{name} must be a number from 0 to 1, got {value!r}")

    @property
    def query_rows(self) -> int:
        """The window."""
        return self.window

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Importance and, against it, redundancy."""
        voters = evidence.asked.sum(dim=1).clamp(1, self.window)[:, None, None]
        votes = sum(self._pooled(block.amax(dim=2), evidence).sum(dim=2) for block in evidence.attention(self.window))
        assert isinstance(votes, Tensor)
        worth = self.weight * votes / voters - (1 - self.weight) * self._redundancy(evidence)
        return newest_first(worth, evidence, self.window)

    def _pooled(self, attention: Float[Tensor, "b h r t"], evidence: Evidence) -> Float[Tensor, "b h r t"]:
        """The largest among neighbours."""

        def largest(rows: Tensor) -> Tensor:
            return functional.max_pool1d(rows.flatten(1, 2), self.kernel, 1, self.kernel // 2).view_as(rows)

        return by_position(largest, attention, evidence)

    def _redundancy(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Softmax of each key's mean similarity to all keys."""
        real = evidence.real.expand(evidence.keys.shape[:3])
        keys = functional.normalize(evidence.keys.float(), dim=-1) * real[..., None]
        place = evidence.position.masked_fill(~evidence.real, -1)[:, :, None]
        total = torch.zeros_like(keys[..., 0])
        count, spared = keys.shape[2], min(self.spared, keys.shape[2])
        step = max(1, _BLOCK // max(1, keys[..., 0].numel()))
        for start in range(0, count, step):
            similar = keys[:, :, start : start + step] @ keys.mT
            similar.diagonal(start, -2, -1).zero_()
            if spared:
                newest = place.expand_as(similar).masked_fill(similar <= self.alike, -1).topk(spared, dim=-1)
                kept = similar.gather(-1, newest.indices).where(newest.values < 0, 0)
                similar = similar.scatter(-1, newest.indices, kept)
            total += similar.sum(dim=2)
        mean = total / real.sum(dim=-1, keepdim=True).clamp(min=1)
        return mean.masked_fill(~real, torch.finfo(torch.float32).min).softmax(dim=-1)
