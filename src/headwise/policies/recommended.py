"""Recommended: a policy that nobody asked for, and a model -> the same, fitted to what there is for that model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from headwise.errors import MismatchError
from headwise.gate.checkpoint import check_gates, load_gates, shipped_gates
from headwise.policies.base import Policy
from headwise.policies.match import Match
from headwise.policies.scored import Rechoosing
from headwise.policies.wrapper import Wrapper


def by_gates(policy: Policy, model: nn.Module) -> Policy:
    """With scores predicted by the gates that come with headwise, where these are for that model."""
    if isinstance(policy, Wrapper):
        return replace(policy, policy=by_gates(policy.policy, model))
    if "gate" not in policy.parameters():
        return policy
    try:
        check_gates(load_gates(shipped_gates()), model)
    except MismatchError:
        return policy
    return replace(policy, gate=True)  # type: ignore[type-var]  # as above


def unmatched(policy: Policy) -> Policy:
    """Without refitted rows, so that nothing keeps it from choosing again."""
    if not isinstance(policy, Match):
        return policy
    inner = policy.policy
    return replace(inner, of="seen") if isinstance(inner, Rechoosing) else inner
