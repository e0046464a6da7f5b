"""Facts about one sequence by hand, as rules are given them."""

from __future__ import annotations

import torch

from headwise.policies.tokens import Tokens


def facts(*, positions, seen=None, prompt=10, kinds=None, scores=None, valid=None, heads=1, layer=0):
    """Facts about one sequence; every head sees the same unless scores has several rows."""
    position = torch.tensor(positions).view(1, 1, -1).expand(1, heads, -1)
    seen = max(positions) + 1 if seen is None else seen
    ok = torch.ones_like(position, dtype=torch.bool) if valid is None else torch.tensor(valid).view(1, 1, -1)
    return Tokens(
        position=position,
        age=seen - 1 - position,
        valid=ok,
        pool=ok,
        prompt=torch.tensor([[[prompt]]]),
        seen=torch.tensor([[[seen]]]),
        kind=None if kinds is None else torch.tensor(kinds, dtype=torch.uint8).view(1, 1, -1),
        score=None if scores is None else torch.tensor(scores, dtype=torch.float32).view(1, heads, -1),
        layer=layer,
    )
