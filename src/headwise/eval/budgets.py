"""Budgets: a policy and budgets as words -> the policy at every size asked for, or as it is where it states its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields

from headwise.errors import ConfigurationError
from headwise.policies import Policy, list_policies
from headwise.policies.checks import check_size
from headwise.policies.size import Size
from headwise.policies.words import parse_policy
from headwise.units import parse_bytes

# Stands in for a size until there is one.
_EVERYTHING = 1.0


@dataclass(frozen=True)
class SizedPolicy:
    """A policy at one of the sizes that were asked for.

    Attributes:
        spec: as it was given.
        label: different for every size.
        policy: with the budget in it, unless that is one of bytes.
        bytes: budget as text, such as "64MiB"; it becomes tokens when the model is known.
    """

    spec: str
    label: str
    policy: Policy
    bytes: str | None = None


def at_budgets(spec: str, budgets: Sequence[str]) -> Iterator[SizedPolicy]:
    """The policy at every budget; once, as it is, where it states its size or has none to set.

    Args:
        spec: such as `snapkv`, or `snapkv:keep=0.25`, which states its size.
        budgets: tokens per KV head such as "512", shares of the prompt such as "0.25", or bytes such as "64MiB".

    Raises:
        UnknownPolicyError, ConfigurationError: for a policy or a budget that cannot be what it says.
    """
    policy = _without_size(spec) if budgets else None
    if policy is None:
        yield SizedPolicy(spec, spec, parse_policy(spec))
        return
    for text in (budget.strip() for budget in budgets):
        size, label = _read(text), f"{spec} at {text}"
        if isinstance(size, str):
            yield SizedPolicy(spec, label, policy, size)
        else:
            yield SizedPolicy(spec, label, policy.with_keep(size))


def split_specs(text: str) -> list[str]:
    """Policies with commas between them; what only sets a parameter belongs to the policy before it."""
    specs: list[str] = []
    for part in text.split(","):
        if specs and "=" in part and ":" not in part:
            specs[-1] += f",{part}"
        else:
            specs.append(part.strip())
    return specs


def _read(text: str) -> Size | str:
    for kind in (int, float):
        try:
            size = kind(text)
        except ValueError:
            continue
        check_size(f"budget {text}", size)
        return size
    parse_bytes(text)
    return text


def _without_size(spec: str) -> Policy | None:
    """The policy with room for everything; None where the spec states a size, or the policy has none to set."""
    name, colon, rest = spec.partition(":")
    known = list_policies().get(name.strip())
    if known is None:
        return None
    stated = {part.partition("=")[0].strip() for part in rest.split(",") if "=" in part}
    missing = [f.name for f in fields(known) if f.default is MISSING and f.name not in stated]  # type: ignore[arg-type]  # policies are dataclasses
    filled = spec + "".join(
        f"{',' if colon or number else ':'}{field}={_EVERYTHING}" for number, field in enumerate(missing)
    )
    policy = parse_policy(filled)
    try:
        small, large = policy.with_keep(_EVERYTHING / 4), policy.with_keep(_EVERYTHING / 2)
    except ConfigurationError:
        return None
    # What a budget sets: parameters that follow it, and those it puts out of force, as a recovery.
    given, less, more = (it.parameters() for it in (policy, small, large))
    sizes = {field for field, value in less.items() if value != more[field] or value is None is not given[field]}
    return None if stated & sizes else policy
