"""Registry: a policy's name and parameters -> the policy; every file of this folder is found by itself."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import TypeVar

from headwise.errors import ConfigurationError, UnknownPolicyError, or_nearest
from headwise.policies.base import Policy

_POLICIES: dict[str, type[Policy]] = {}

# What policies were once called -> what they are called now.
_FORMER_NAMES: dict[str, str] = {}

P = TypeVar("P", bound=type[Policy])


def register(name: str, *, former: str | None = None) -> Callable[[P], P]:
    """Class decorator that makes a policy known under `name`.

    Args:
        former: a name that it had, under which it can still be created.

    Raises:
        ConfigurationError: when another class has that name.
    """

    def add(policy: P) -> P:
        if name in _POLICIES:
            raise ConfigurationError(f"policy {name!r} is registered twice: {_POLICIES[name]} and {policy}")
        policy.name = name
        _POLICIES[name] = policy
        if former is not None:
            _FORMER_NAMES[former] = name
        return policy

    return add


@cache
def list_policies() -> dict[str, type[Policy]]:
    """Every registered policy by name, in alphabetical order."""
    package = importlib.import_module("headwise.policies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"headwise.policies.{module.name}")
    return dict(sorted(_POLICIES.items()))


def current_name(name: str) -> str:
    """The name that a policy has now, where it once had another."""
    list_policies()
    if name not in _FORMER_NAMES:
        return name
    warnings.warn(f"policy {name!r} is now called {_FORMER_NAMES[name]!r}", DeprecationWarning, stacklevel=3)
    return _FORMER_NAMES[name]


def create_policy(name: str, **parameters: object) -> Policy:
    """The policy of that name.

    Raises:
        UnknownPolicyError: when there is none; the message names the nearest.
        ConfigurationError: when a parameter is unknown, missing or out of range.
    """
    known, name = list_policies(), current_name(name)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
        raise UnknownPolicyError(f"unknown policy {name!r}; did you mean {' or '.join(near)}?")
    accepted = {field.name: field for field in fields(known[name])}  # type: ignore[arg-type]  # policies are dataclasses
    for parameter in parameters:
        if parameter not in accepted:
            offered = ", ".join(accepted) or "none"
            raise ConfigurationError(
                f"policy {name!r} has no parameter {parameter!r}; it has: {offered}" + or_nearest(parameter, accepted)
            )
    missing = [n for n, f in accepted.items() if f.default is MISSING and n not in parameters]
    if missing:
        raise ConfigurationError(f"policy {name!r} needs a value for: {', '.join(missing)}")
    return known[name](**parameters)
