"""Speed: a passage, its beginning compressed -> how fast tokens are decoded behind it, and what every head keeps."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import torch
from transformers import Cache

from headwise.eval.cache_kinds import FULL_CACHE, CacheKind
from headwise.eval.kept import describe_kept
from headwise.eval.passages import Passages
from headwise.eval.task import Context, Item, Measured, Subject
from headwise.measure.turns import turns
from headwise.policies.checks import check_count
from headwise.types import Int, Tensor
from headwise.units import clock


@dataclass(frozen=True)
class Speed(Passages):
    """Decoding on the compressed cache and on the full one in turn, round by round. Metrics, per passage:

    `tokens_per_second`: median of the rounds. `speedup`: seconds of the full cache over those of the compressed one
    in the same round, median of the rounds; a machine that is slower for a while is so for both.

    A round has as many tokens as there are between two evictions, so that each has one. One round more comes first,
    to warm up. The details hold what every head keeps.

    Args:
        rounds: that are timed.
    """

    rounds: int = 3

    name: ClassVar[str] = "speed"
    primary: ClassVar[str] = "tokens_per_second"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rounds", self.rounds, 1)

    def reference(self, subject: Subject, item: Item) -> Context:
        """The context in a full cache."""
        subject.check_room(self.context + (self.rounds + 1) * _per_round(subject))
        return subject.read(self.ids(subject, item)[:, : self.context], FULL_CACHE)

    def measure(self, subject: Subject, item: Item, kind: CacheKind, reference: Context) -> Measured:
        """Compress the context, and let the two caches take turns."""
        ids, per_round = self.ids(subject, item), _per_round(subject)
        context = subject.read(ids[:, : self.context], kind)
        pair = {"full": reference.cache, "ours": context.cache}
        seconds: dict[str, list[float]] = {name: [] for name in pair}
        # Where there are more rounds than text, that begins anew.
        places = torch.arange((self.rounds + 1) * per_round, device=ids.device) % self.steps
        fed = ids[:, self.context :][:, places]
        for number, tokens in enumerate(fed.split(per_round, dim=1)):
            for name in turns(list(pair), number):
                seconds[name].append(_decode(subject, pair[name], tokens))
        # As the next cache must find it.
        with torch.inference_mode():
            reference.cache.crop(-fed.shape[1])
        full, ours = (rounds[1:] for rounds in seconds.values())
        metrics = {
            "tokens_per_second": median(per_round / taken for taken in ours),
            "speedup": median(theirs / taken for theirs, taken in zip(full, ours, strict=True)),
        }
        return context.measured(metrics, rounds=ours, full_rounds=full, kept=describe_kept(context.report))


def _per_round(subject: Subject) -> int:
    return int(subject.options.get("evict_every", 1))


def _decode(subject: Subject, cache: Cache, ids: Int[Tensor, "1 t"]) -> float:
    """Seconds that it takes to feed the tokens one by one."""
    started = clock(subject.model.device)
    with torch.inference_mode():
        for token in ids.split(1, dim=1):
            subject.model(input_ids=token, past_key_values=cache)
    return clock(subject.model.device) - started
