"""FastGen: every head gets the cheapest rule of a ladder that keeps enough of its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from headwise.errors import ConfigurationError, or_nearest
from headwise.policies.base import Policy, Rule
from headwise.policies.checks import check_choice, check_size, check_switch, check_target
from headwise.policies.choice import Selection
from headwise.policies.frequent import Frequent
from headwise.policies.full import Full
from headwise.policies.punctuation import Punctuation
from headwise.policies.registry import register
from headwise.policies.sinks import Sinks
from headwise.policies.size import Size
from headwise.policies.special import Special
from headwise.policies.window import Window

PAPER_LADDER = (
    "special",
    "special+punctuation",
    "special+punctuation+frequent",
    "special+punctuation+frequent+local",
    "full",
)


@register("fastgen")
@dataclass(frozen=True)
class FastGen(Policy):
    """Adaptive compression: profile each KV head on the prompt, then keep what it uses (Ge et al., ICLR 2024).

    The defaults are the paper's settings, where it states them. The profile is made once, of the first prompt;
    the rule and the width of its window then stay for the life of the cache.

    Args:
        recovery: T of equation 1, the share of attention mass a rule must retain; 1 keeps everything, 0 takes
            the first rung.
        keep: instead of it, tokens of the prompt per KV head, on average over the model: a count (int), or a
            fraction (float). Every head then has the highest recovery with which the model stays within it; the
            whole cache is held until all layers are profiled.
        local: r_l, width of the local window: a fraction of the prompt (float) or a count (int).
        frequent: r_f, heavy hitters: a fraction of the tokens seen so far (float), so that their number grows
            while generating, or a count (int).
        sinks: first tokens kept by every compressed rung; the paper has none, 4 is wise where the tokenizer
            adds no BOS.
        rows: retained mass is the mean over all query rows of the prompt ("mean"), or over the last `last_rows`
            ("last"), which is stricter and nearer to what decoding sees.
        last_rows: how many rows "last" means.
        fold: a KV head retains what its worst query head retains ("min"), or their mean ("mean"). The paper has
            one query head per KV head.
        criterion: compare retained mass with T ("mass"), or the L1 distance after renormalising with 1 - T ("l1").
        frequent_among: draw heavy hitters from "all" tokens, or from the "rest" that no other rule of the rung
            keeps.
        normalize: divide accumulated mass by the number of queries that could see the token.
        profile_rows: query rows the profile reads: 1.0 is exact; a smaller fraction (float) or a count (int)
            reads evenly spaced rows, and the report says so.
        ladder: the rungs, cheapest first: names joined by a plus sign, or `Rule` objects; one must be "full".

    Raises:
        ConfigurationError: for a value out of range, an unknown rule in the ladder, or a ladder without "full".
    """

    recovery: int | float | None = None
    local: Size = 0.3
    frequent: Size = 0.3
    sinks: int = 0
    rows: Literal["mean", "last"] = "mean"
    last_rows: int = 32
    fold: Literal["min", "mean"] = "min"
    criterion: Literal["mass", "l1"] = "mass"
    frequent_among: Literal["all", "rest"] = "all"
    normalize: bool = False
    profile_rows: Size = 1.0
    ladder: tuple[str | Rule, ...] = PAPER_LADDER
    keep: Size | None = None

    def __post_init__(self) -> None:
        check_target("fastgen", self.recovery, self.keep)
        if isinstance(self.last_rows, bool) or not isinstance(self.last_rows, int) or self.last_rows < 1:
            raise ConfigurationError(f"last_rows must be a count of 1 or more, got {self.last_rows!r}")
        check_size("profile_rows", self.profile_rows)
        if self.profile_rows == 0:
            raise ConfigurationError("profile_rows must be more than 0: there is no profile without a row")
        check_switch("normalize", self.normalize)
        check_choice("rows", self.rows, ("mean", "last"))
        check_choice("fold", self.fold, ("min", "mean"))
        check_choice("criterion", self.criterion, ("mass", "l1"))
        if not any(rung.keeps_all for rung in self.rungs):
            raise ConfigurationError('the ladder must have "full" for heads that no cheaper rung serves')

    @cached_property
    def rungs(self) -> tuple[Rule, ...]:
        """The rules of the ladder."""
        return tuple(self._rung(rung) for rung in self.ladder)

    @property
    def selection(self) -> Selection:
        """Equation 1 in the reading that the parameters name."""
        last_rows = self.last_rows if self.rows == "last" else None
        return Selection(self.recovery, self.keep, last_rows, self.fold, self.criterion)

    @property
    def needs_all_layers(self) -> bool:
        """A budget is the model's."""
        return self.keep is not None

    def with_keep(self, keep: Size) -> FastGen:
        """A budget instead of the recovery."""
        return replace(self, recovery=None, keep=keep)

    def _rung(self, rung: str | Rule) -> Rule:
        if isinstance(rung, Rule):
            return rung
        parts: dict[str, Callable[[], Rule]] = {
            "special": Special,
            "punctuation": Punctuation,
            "frequent": lambda: Frequent(self.frequent, among=self.frequent_among, normalize=self.normalize),
            "local": lambda: Window(self.local, of="prompt"),
            "sinks": lambda: Sinks(self.sinks),
            "full": Full,
        }
        names = rung.split("+")
        for name in names:
            if name not in parts:
                raise ConfigurationError(
                    f"unknown rule {name!r} in the ladder; rules are: {', '.join(parts)}" + or_nearest(name, parts)
                )
        if names == ["full"]:
            return Full()
        if self.sinks and "sinks" not in names:
            names = ["sinks", *names]
        first, *others = (parts[name]() for name in names)
        for other in others:
            first = first | other
        return first
