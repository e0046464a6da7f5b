"""Every registered policy, with parameters that suit a short prompt."""

from __future__ import annotations

from dataclasses import MISSING, fields

import headwise


def example(policy):
    """The policy with 0.3 for every parameter that has no default, and for a recovery; sizes and targets take it."""
    return policy(**{f.name: 0.3 for f in fields(policy) if f.default is MISSING or f.name == "recovery"})


EVERY = [example(policy) for policy in headwise.list_policies().values()]
