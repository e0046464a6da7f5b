"""Outcome: a run with a compressed cache, and perhaps one with transformers' own -> what `generate` tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwise.cli.report_output import describe_report
from headwise.cli.text_generation import Generated, differing_words, first_difference

if TYPE_CHECKING:
    from headwise.policies import Policy
    from headwise.report.report import Report


@dataclass(frozen=True)
class GenerateResult:
    """A text that was generated with a headwise cache, and perhaps one with transformers' own.

    Attributes:
        full: with transformers' own cache; None where it was not asked for.
        full_memory: bytes of that cache, by name.
    """

    policy: Policy
    prompt_tokens: int
    load_seconds: float
    generated: Generated
    report: Report
    full: Generated | None = None
    full_memory: dict[str, int] | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time went. Prefill is the time to the first token without what profile and pages took of it."""
        profile, compact = self.report.profile_seconds, self.report.compact_seconds
        return {
            "load": self.load_seconds,
            "prefill": max(0.0, self.generated.first - profile - compact),
            "profile": profile,
            "compact": compact,
            "decode": self.generated.rest,
        }

    @property
    def first_difference(self) -> int | None:
        """The first new token in which the two texts differ; None when they are equal."""
        return None if self.full is None else first_difference(self.generated.token_ids, self.full.token_ids)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        report = self.report
        result = {
            "text": self.generated.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.generated.token_ids),
            **describe_report(self.policy, report),
            "seconds": self.seconds,
        }
        if report.sampled is not None and report.sampled < 1:
            result["sampled"] = report.sampled
        if report.steering is not None:
            result["steering"] = report.steering.to_dict() | {"pinned_bytes": report.pinned_bytes}
        if self.full is not None:
            result["full"] = {
                "text": self.full.text,
                "first_difference": self.first_difference,
                "memory": self.full_memory,
            }
        return result

    def difference(self, full: Generated) -> str:
        """In words, where the two texts differ."""
        index = self.first_difference
        if index is None:
            return f"both texts are the same, all {len(full.token_ids)} new tokens"
        ours, theirs = differing_words(self.generated.text, full.text)
        if self.generated.text == full.text:
            return f"the texts read the same and differ in new token {index}"
        return (
            f"the texts first differ in new token {index}: {_word(ours)} with {self.policy.title}, "
            f"{_word(theirs)} with the full cache"
        )


def _word(word: str) -> str:
    return f"“{word}”" if word else "the end"
