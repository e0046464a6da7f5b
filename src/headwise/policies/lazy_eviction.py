"""LazyEviction: the tokens that come back, and have not been away for longer than they ever were."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.errors import ConfigurationError
from headwise.policies.checks import check_count
from headwise.policies.choice import Again
from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import Scored, newest_first
from headwise.policies.size import Size
from headwise.types import Float, Int, Tensor

# So that what never came back has an interval to divide by.
_NEVER = 1e-5


@register("lazy-eviction")
@dataclass(frozen=True)
class LazyEviction(Scored):
    """Keeps tokens by how regularly they are looked at (Zhang et al., 2025; the equations of the authors' program).

    arXiv 2506.15969, made for long reasoning, in which tokens are needed again after a while in which nobody looks at
    them. A token is active when a query of its group gives it `threshold` of its attention or more. Of each is known
    when it last was, and the longest interval between two such times. A token that has been away for long, measured by
    that interval, is worth little; one that comes back often is worth a little more. Nothing is dropped in between:
    once in `choose_every` tokens all queries since then are looked at (of a further prompt as many of the newest), and
    the newest tokens are kept. At the end of the prompt its last queries are looked at as though they had been
    generated.

    Args:
        keep: tokens per KV head: a count (int), or a fraction (float).
        window: newest tokens that are kept, and whose queries count at the end of the prompt.
        threshold: share of a query's attention from which on a token is active, alpha of the paper.
    """

    keep: Size
    window: int = 32
    threshold: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        value = self.threshold
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigurationError(f"threshold must be a number above 0 and up to 1, got {value!r}")

    @property
    def query_rows(self) -> int:
        """Those of the window."""
        return self.window

    @property
    def again(self) -> Again | None:
        """By all queries since the last choice."""
        return None if self.of == "prompt" else Again(self.choose_every, self.choose_every, remembers=True)

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """At the end of the prompt, by its last queries."""
        return self._worth(self.remember(evidence), evidence)

    def score_again(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """By what rows remember."""
        assert evidence.remembered is not None
        return self._worth(evidence.remembered, evidence)

    def remember(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """When each was last active, counted from its own position, and its longest interval: two numbers in one."""
        position = evidence.position.expand(evidence.keys.shape[:3])
        if evidence.remembered is None:
            # Nothing is known from before the first query that is looked at.
            rows, last = self.window, position.maximum(evidence.first_asked(self.window)[:, None, None] - 1)
            longest = torch.zeros_like(last)
        else:
            rows, (since, longest) = self.choose_every, _unpacked(evidence.remembered)
            last = position + since
        for asked, attention in evidence.attention_by_query(rows):
            active = attention.amax(dim=2) >= self.threshold
            latest = torch.where(active, asked[:, None, :, None], -1).cummax(dim=2).values.maximum(last[:, :, None])
            before = torch.cat([last[:, :, None], latest[:, :, :-1]], dim=2)
            longest = longest.maximum((asked[:, None, :, None] - before).where(active, 0).amax(dim=2))
            last = latest[:, :, -1]
        return _packed(last - position, longest)

    def _worth(self, remembered: Float[Tensor, "b h t"], evidence: Evidence) -> Float[Tensor, "b h t"]:
        since, longest = _unpacked(remembered)
        away = evidence.age - since
        worth = 2 * (-(1 + away / (longest + _NEVER))).sigmoid()
        again = torch.where(longest > 0, 2 * (1 - longest.float()).sigmoid(), 0)
        return newest_first(worth + again, evidence, self.window)


def _packed(since: Int[Tensor, "b h t"], longest: Int[Tensor, "b h t"]) -> Float[Tensor, "b h t"]:
    """Two counts of tokens in the four bytes of what a row remembers, each to eleven bits."""
    most = int(torch.finfo(torch.float16).max)
    both = torch.stack([since, longest], dim=-1).clamp(max=most).to(torch.float16)
    return both.view(torch.float32)[..., 0]


def _unpacked(remembered: Float[Tensor, "b h t"]) -> tuple[Int[Tensor, "b h t"], Int[Tensor, "b h t"]]:
    """The two counts."""
    since, longest = remembered.contiguous()[..., None].view(torch.float16).long().unbind(dim=-1)
    return since, longest
