"""Keep media: a policy -> the same for text, and every token that stands for an image, a video or a sound kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from headwise.errors import ConfigurationError
from headwise.policies.base import Fact, Policy, Rule
from headwise.policies.choice import Again, Choice, FormatLoss, PromptSummary, Selection
from headwise.policies.evidence import Evidence
from headwise.policies.size import Size
from headwise.policies.tokens import Tokens
from headwise.policies.wrapper import Wrapper
from headwise.quant.formats import Precision
from headwise.types import Bool, Float, Int, Kind, Tensor


@dataclass(frozen=True)
class KeepMedia(Policy):
    """Keeps every image, video and sound of the prompt, and of the text around them what another policy keeps.

    The other policy neither ranks nor counts them: its budget is for the text, and they come on top of it. A fraction
    is still one of the whole prompt.

    Args:
        policy: what decides which tokens of the text stay.

    Raises:
        ConfigurationError: when the policy is none, or wraps another itself: `Quantized(KeepMedia(...))` is the order.
    """

    name: ClassVar[str] = "keep-media"

    policy: Policy

    def __post_init__(self) -> None:
        if isinstance(self.policy, Wrapper):
            outer = type(self.policy).__name__
            raise ConfigurationError(f"KeepMedia stands inside: {outer}(KeepMedia(...)), not KeepMedia({outer}(...))")
        if not isinstance(self.policy, Policy) or isinstance(self.policy, KeepMedia):
            raise ConfigurationError(f"KeepMedia wraps a policy such as SnapKV(keep=0.25), got {self.policy!r}")

    def __str__(self) -> str:
        """How Python would build it."""
        return f"KeepMedia({self.policy})"

    @property
    def title(self) -> str:
        """The policy's, and what is kept beside."""
        return f"{self.policy.title} and all media"

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """Those of the policy, for the text."""
        return tuple(rung if rung.keeps_all else MediaAnd(rung) for rung in self.policy.rungs)

    @property
    def facts(self) -> frozenset[Fact]:
        """What tokens stand for, and what the policy looks at."""
        return self.policy.facts | {"media"}

    def choose(self, layers: Sequence[PromptSummary]) -> list[Choice]:
        """As the policy chooses where there is only text."""
        return self.policy.choose([_text(layer) for layer in layers])

    def remember(self, evidence: Evidence) -> Float[Tensor, "b h t"] | None:
        """As the policy does."""
        return self.policy.remember(evidence)

    def assess_again(self, evidence: Evidence) -> tuple[Float[Tensor, "b h t"] | None, FormatLoss | None]:
        """As the policy does."""
        return self.policy.assess_again(evidence)

    def choose_again(self, layers: Sequence[PromptSummary]) -> list[Choice]:
        """As the policy chooses where there is only text."""
        return self.policy.choose_again([_text(layer) for layer in layers])

    def assess(self, evidence: Evidence) -> tuple[Float[Tensor, "b h t"] | None, FormatLoss | None]:
        """As the policy does."""
        return self.policy.assess(evidence)

    def with_keep(self, keep: Size) -> KeepMedia:
        """With another budget for the text."""
        return replace(self, policy=self.policy.with_keep(keep))

    def with_bytes(self, count: int) -> KeepMedia | None:
        """With so many bytes for the text, where the policy counts in bytes."""
        inner = self.policy.with_bytes(count)
        return None if inner is None else replace(self, policy=inner)

    @property
    def selection(self) -> Selection | None:
        """The policy's."""
        return self.policy.selection

    @property
    def profile_rows(self) -> Size:
        """The policy's."""
        return self.policy.profile_rows

    @property
    def needs_all_layers(self) -> bool:
        """As the policy has it."""
        return self.policy.needs_all_layers

    @property
    def needs_evidence(self) -> bool:
        """As the policy has it."""
        return self.policy.needs_evidence

    @property
    def needs_repetition(self) -> bool:
        """As the policy has it."""
        return self.policy.needs_repetition

    @property
    def needs_rotation(self) -> bool:
        """As the policy has it."""
        return self.policy.needs_rotation

    @property
    def gates(self) -> bool | str:
        """The policy's."""
        return self.policy.gates

    @property
    def query_rows(self) -> int | None:
        """The policy's."""
        return self.policy.query_rows

    @property
    def again(self) -> Again | None:
        """The policy's."""
        return self.policy.again

    @property
    def precision(self) -> Precision | None:
        """The policy's."""
        return self.policy.precision


@dataclass(frozen=True)
class MediaAnd(Rule):
    """Keeps what stands for media, and what another rule keeps where there is nothing else. Not registered."""

    rule: Rule

    @property
    def label(self) -> str:
        """The rule's, after what is kept beside."""
        return f"media+{self.rule.label}"

    @property
    def reads(self) -> frozenset[Fact]:
        """What a token stands for, and what the rule looks at."""
        return self.rule.reads | {"media"}

    @property
    def evicts(self) -> bool:
        """As the rule does."""
        return self.rule.evicts

    @property
    def chosen_once(self) -> bool:
        """As the rule has it."""
        return self.rule.chosen_once

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Media, and of the rest what the rule keeps."""
        media = is_media(tokens)
        return media | self.rule.keep(without(tokens, media))

    def static(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """The same, without the rule's window."""
        media = is_media(tokens)
        return media | self.rule.static(without(tokens, media))

    def width(self, prompt: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The rule's window."""
        return self.rule.width(prompt)


def _text(layer: PromptSummary) -> PromptSummary:
    """What is known of the tokens that stand for nothing but themselves."""
    media = is_media(layer.tokens)
    kept = None if layer.kept is None else layer.kept - (media & layer.tokens.valid).sum(dim=-1)
    return replace(layer, tokens=without(layer.tokens, media), kept=kept)


def is_media(tokens: Tokens) -> Bool[Tensor, "b h n"]:
    """Which tokens stand for what the model sees or hears."""
    assert tokens.kind is not None
    return (tokens.kind & int(Kind.MEDIA)) != 0


def without(tokens: Tokens, those: Bool[Tensor, "b h n"]) -> Tokens:
    """The facts as they were if those tokens were padding; positions, and what was seen, stay."""
    return replace(tokens, valid=tokens.valid & ~those, pool=tokens.pool & ~those, memo={})
