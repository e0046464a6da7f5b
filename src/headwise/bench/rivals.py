"""Rivals: what the command line asks for -> the caches that compete, at any length of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from headwise.bench.candidates import (
    Candidate,
    captured,
    check_policy,
    coded,
    full,
    in_rows,
    kept,
    pressed,
    quantized,
    recovering,
    remembering,
    stock,
)
from headwise.policies import Full


@dataclass(frozen=True)
class Rivals:
    """Which caches compete.

    Attributes:
        policy: name of what keeps a given share of the prompt.
        keeps: those shares.
        recoveries: of FastGen.
        rows: dtypes of exact rows that every headwise cache runs with too.
        bits: formats of older rows, such as "int8", that it runs with too.
        graph: whether every headwise cache runs with a captured step too.
        less: whether all that evict run with LESS too.
        kernels: folder of its kernels; None for those that come with headwise.
        backend: of transformers' quantized cache; None to leave that out.
        press: of kvpress; None to leave that out.

    Raises:
        ConfigurationError: for a policy that cannot be told how much to keep.
    """

    policy: str
    keeps: Sequence[float]
    recoveries: Sequence[float] = ()
    rows: Sequence[torch.dtype] = ()
    bits: Sequence[str] = ()
    graph: bool = False
    less: bool = False
    kernels: Path | None = None
    backend: str | None = None
    press: str | None = None

    def __post_init__(self) -> None:
        check_policy(self.policy)

    def at(self, context: int) -> list[Candidate]:
        """All of them, for prompts of that length.

        Raises:
            ConfigurationError: for bits that there are not.
        """
        ours = self._ours(context)
        return [
            stock(),
            *([quantized(self.backend)] if self.backend else []),
            *ours,
            *(pressed(self.press, share) for share in self.keeps if self.press),
            *(remembering(one, self.kernels) for one in ours if self.less and _evicts(one)),
        ]

    def _ours(self, context: int) -> list[Candidate]:
        """headwise's, without LESS."""
        exact = [
            full(),
            *(kept(self.policy, share, context) for share in self.keeps),
            *(recovering(share) for share in self.recoveries),
        ]
        plain = [
            *exact,
            *(in_rows(one, dtype) for dtype in self.rows for one in exact),
            *(coded(one, word) for word in self.bits for one in exact),
        ]
        return [*plain, *(captured(one) for one in plain if self.graph)]


def _evicts(candidate: Candidate) -> bool:
    return candidate.policy is not None and not isinstance(candidate.policy.chooser, Full)
