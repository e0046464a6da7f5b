"""Policies and rules: configuration -> which tokens a KV head keeps.

A *rule* is an elementwise formula over facts about tokens. The same formula profiles the prompt, compacts it and
evicts at every later step. A *policy* offers rules, cheapest first, and says how a head's rule is chosen among
them. A rule alone is a policy that leaves nothing to choose; `a | b` keeps what either keeps.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import ClassVar, Literal

import torch

from headwise.errors import ConfigurationError
from headwise.policies.choice import Again, Choice, FormatLoss, PromptSummary, Selection, cheapest_rungs
from headwise.policies.evidence import Evidence
from headwise.policies.size import Size
from headwise.policies.tokens import Tokens
from headwise.quant.formats import Precision
from headwise.types import Bool, Float, Int, Tensor

# What the tokenizer says of a token, what the model puts in its place, and what attention it got.
Fact = Literal["kind", "media", "score"]

# What policies override, by former names.
_RENAMED_HOOKS = {"deferred": "needs_all_layers", "reconstructs": "needs_repetition", "damage": "format_loss"}


class Policy(ABC):
    """What may be kept, by which KV head. Subclasses are frozen dataclasses: configuration, never state."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **options: object) -> None:
        """Let a policy that was written with former names of its hooks be called by their new ones."""
        super().__init_subclass__(**options)
        for former, name in _RENAMED_HOOKS.items():
            if former in vars(cls):
                warnings.warn(f"{cls.__name__}.{former} is now {name}", DeprecationWarning, stacklevel=2)
                setattr(cls, name, vars(cls)[former])

    @property
    @abstractmethod
    def rungs(self) -> tuple[Rule, ...]:
        """The rules a head may get, cheapest first; never empty."""

    @property
    def selection(self) -> Selection | None:
        """How to choose among the rungs; None where there is only one."""
        return None

    @property
    def profile_rows(self) -> Size:
        """How many query rows of the prompt the profile reads: a count, or a fraction of the prompt."""
        return 1.0

    @property
    def title(self) -> str:
        """A few words for people: its name, and what wrappers add to it."""
        return self.name or str(self)

    @property
    def chooser(self) -> Policy:
        """What decides which tokens stay: the policy itself, unless it wraps another."""
        return self

    @property
    def needs_all_layers(self) -> bool:
        """Whether a layer waits for all the others before it is compacted; the peak is then the full cache."""
        return False

    @property
    def needs_evidence(self) -> bool:
        """Whether `assess` looks at what a layer holds at the end of the prompt."""
        return False

    @property
    def needs_repetition(self) -> bool:
        """Whether the model is to repeat the prompt before anything is chosen."""
        return False

    @property
    def needs_rotation(self) -> bool:
        """Whether it looks at keys and queries as they are before their rotary embedding."""
        return False

    @property
    def gates(self) -> bool | str:
        """Gates that predict the repetition: False for none, True for those that come with headwise, or a folder."""
        return False

    @property
    def asks_queries(self) -> bool:
        """Whether what it keeps depends on what queries look at, in the prompt or after it."""
        return self.needs_evidence or self.selection is not None or "score" in self.facts

    @property
    def query_rows(self) -> int | None:
        """How many of the newest queries the evidence must have; None for all of them."""
        return 0

    @property
    def again(self) -> Again | None:
        """How it chooses once more when more tokens have come; None where it does not."""
        return None

    @property
    def precision(self) -> Precision | None:
        """How older rows are stored; None where all of them stay exact."""
        return None

    def assess(self, evidence: Evidence) -> tuple[Float[Tensor, "b h t"] | None, FormatLoss | None]:
        """What each token is worth, and what formats cost; None where the policy does not choose by that.

        Called where it `needs_evidence`.
        """
        return None, None

    def choose(self, layers: Sequence[PromptSummary]) -> list[Choice]:
        """The rule of every head, and the tokens that stay where they are chosen by score.

        Args:
            layers: one, or all of them where the policy `needs_all_layers`.
        """
        return cheapest_rungs(self.selection, layers)

    def remember(self, evidence: Evidence) -> Float[Tensor, "b h t"] | None:
        """What each row is to carry to the next choice, where `again` says that rows do; asked at every choice."""
        return None

    def assess_again(self, evidence: Evidence) -> tuple[Float[Tensor, "b h t"] | None, FormatLoss | None]:
        """What each row is worth when it is chosen again, and what it costs to store it in fewer bits."""
        return self.assess(evidence)

    def choose_again(self, layers: Sequence[PromptSummary]) -> list[Choice]:
        """Which of the rows that are held stay; `layers` are of rows, in place of the prompt's tokens."""
        return self.choose(layers)

    def with_keep(self, keep: Size) -> Policy:
        """The same policy with room for so many tokens per KV head: a count, or a fraction of the prompt.

        Raises:
            ConfigurationError: when it has no such budget, or the number is out of range.
        """
        if "keep" not in self.parameters():
            raise ConfigurationError(f"{self.name or type(self).__name__} has no budget of tokens to set")
        return replace(self, keep=keep)  # type: ignore[type-var]  # subclasses are dataclasses

    def with_bytes(self, count: int) -> Policy | None:
        """The same policy with so many bytes for a sequence; None where it counts in tokens."""
        return None

    @property
    def facts(self) -> frozenset[Fact]:
        """Which optional facts of `Tokens` the rungs look at."""
        return frozenset().union(*(rung.reads for rung in self.rungs))

    @property
    def reads_kinds(self) -> bool:
        """Whether it looks at `Tokens.kind`."""
        return not self.facts.isdisjoint({"kind", "media"})

    def parameters(self) -> dict[str, object]:
        """The configuration by name, as given."""
        return {field.name: getattr(self, field.name) for field in parameter_fields(type(self))}

    def __str__(self) -> str:
        """How Python would build it, without what is left at its default."""
        own = parameter_fields(type(self))
        given = {f.name: getattr(self, f.name) for f in own if getattr(self, f.name) != f.default}
        words = {name: str(value) if isinstance(value, Policy) else repr(value) for name, value in given.items()}
        return f"{type(self).__name__}({', '.join(f'{name}={word}' for name, word in words.items())})"


def parameter_fields(policy: type[Policy]) -> list[Field[object]]:
    """What a policy can be told; what several have in common, and take by keyword alone, comes last."""
    return sorted(fields(policy), key=lambda field: field.kw_only is True)  # type: ignore[arg-type]  # policies are dataclasses


class Rule(Policy):
    """Keeps the tokens for which a formula over their facts holds.

    `keep` is the whole definition. A rule that looks at a token's age keeps a local window and nothing else by
    it, and says how wide through `width`: profiling needs the two parts apart (FastGen specification, 9.1).
    """

    @property
    def reads(self) -> frozenset[Fact]:
        """Which optional facts of `Tokens` the formula looks at."""
        return frozenset()

    @property
    def ranks_rest(self) -> bool:
        """Whether the rule, in a union, ranks only the tokens that the other members do not keep."""
        return False

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """The rule itself."""
        return (self,)

    @property
    def label(self) -> str:
        """Short name for reports."""
        return self.name

    @property
    def evicts(self) -> bool:
        """Whether the rule may drop tokens after the prompt."""
        return True

    @property
    def keeps_all(self) -> bool:
        """Whether it never drops anything: enough by definition, not by a sum of floats."""
        return False

    @property
    def chosen_once(self) -> bool:
        """Whether it keeps what was chosen of the prompt by other means than its formula."""
        return False

    @abstractmethod
    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """True for every token that stays. Must not modify `tokens`; rows that are not valid may be either."""

    def static(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """The part of `keep` that is the same for every query row: all of it but a local window."""
        return _remembered(self, tokens)

    def width(self, prompt: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Tokens in the local window for a prompt of that many tokens; 0 for no window."""
        return torch.zeros_like(prompt)

    def __or__(self, other: Rule) -> Union:
        return Union((*_members(self), *_members(other)))


def _members(rule: Rule) -> tuple[Rule, ...]:
    return rule.rules if isinstance(rule, Union) else (rule,)


@dataclass(frozen=True)
class Union(Rule):
    """Keeps what any of its rules keeps. Not registered: it is written `a | b`."""

    rules: tuple[Rule, ...]

    def __str__(self) -> str:
        """The members, joined as they are written."""
        return " | ".join(str(rule) for rule in self.rules)

    @property
    def label(self) -> str:
        """The labels of the members, joined by a plus sign."""
        return "+".join(rule.label for rule in self.rules)

    @property
    def reads(self) -> frozenset[Fact]:
        """The facts any member reads."""
        return frozenset().union(*(rule.reads for rule in self.rules))

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """What any member keeps."""
        return self._any(tokens, static=False)

    def static(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """What any member keeps for every query row."""
        return self._any(tokens, static=True)

    def width(self, prompt: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The widest window of the members."""
        return torch.stack([rule.width(prompt) for rule in self.rules]).amax(0)

    def _any(self, tokens: Tokens, *, static: bool) -> Bool[Tensor, "b h n"]:
        # Rules that draw "from the rest" rank only what the others leave, windows included.
        others = torch.zeros_like(tokens.valid)
        for rule in self.rules:
            if not rule.ranks_rest:
                others = others | _remembered(rule, tokens)
        kept = torch.zeros_like(tokens.valid)
        for rule in self.rules:
            facts = tokens.among(~others) if rule.ranks_rest else tokens
            kept = kept | (rule.static(facts) if static else _remembered(rule, facts))
        return kept


def _remembered(rule: Rule, tokens: Tokens) -> Bool[Tensor, "b h n"]:
    """`rule.keep(tokens)`, computed once however many unions the rule is part of."""
    if rule not in tokens.memo:
        tokens.memo[rule] = rule.keep(tokens)
    return tokens.memo[rule]
