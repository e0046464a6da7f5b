"""Long: a passage, its beginning read as a prompt, the rest fed one by one -> how far predictions are off at its end.

What a budget is worth when output is long shows late: only the last predictions count, and what is held is looked at
after every pass.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from headwise.eval.cache_kinds import CacheKind
from headwise.eval.fidelity import Fidelity, compare
from headwise.eval.task import Context, Item, Measured, Subject
from headwise.policies.checks import check_count
from headwise.types import Float, Int, Tensor

# Of the last tokens, which are fed one by one and timed.
_TIMED = 64


@dataclass(frozen=True)
class Long(Fidelity):
    """As `Fidelity`, of the last predictions alone. Metrics, per passage, beside those:

    `held`: bytes of the rows kept at the end, as a share of a full cache of the model's dtype. `most`: the largest
    share after any pass. `step_ms`: mean time of the last tokens, which come one by one, choices among them included.

    Args:
        last: predictions that count, of the last of the steps.
    """

    name: ClassVar[str] = "long"

    context: int = 1000
    steps: int = 3000
    passages: int = 4
    last: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("last", self.last, 1)

    @property
    def _counted(self) -> int:
        return min(self.last, self.steps)

    def reference(self, subject: Subject, item: Item) -> Float[Tensor, "last vocabulary"]:
        """Log-probabilities of the full cache, from one pass over the passage."""
        ids = self.ids(subject, item)[:, :-1]
        subject.check_room(ids.shape[-1])
        with torch.inference_mode():
            logits: Tensor = subject.model(input_ids=ids, use_cache=False, logits_to_keep=self._counted).logits[0]
        return logits.float().log_softmax(dim=-1)

    def measure(
        self, subject: Subject, item: Item, kind: CacheKind, reference: Float[Tensor, "last vocabulary"]
    ) -> Measured:
        """Read the prompt, feed the rest, and compare the end."""
        ids = self.ids(subject, item)
        context = subject.read(ids[:, : self.context], kind)
        rows, most, seconds = self._fed(subject, context, ids[:, self.context : -1], kind)
        metrics, nll = compare(reference, rows.float().log_softmax(dim=-1), ids[0, -self._counted :])
        context.report = kind.report(subject.model, context.cache, ids.shape[1] - 1)
        share = context.report.used_bytes / context.report.full_bytes
        metrics |= {"held": share, "most": max(most, share), "step_ms": 1000 * statistics.fmean(seconds)}
        return context.measured(metrics, nll=nll, document=item.data["document"], start=item.data["start"])

    def _fed(
        self, subject: Subject, context: Context, ids: Int[Tensor, "1 t"], kind: CacheKind
    ) -> tuple[Float[Tensor, "last vocabulary"], float, list[float]]:
        """Logits of the last tokens, the largest share that was held, and the time of each that came by itself."""
        logits: list[Tensor] = []
        most, seconds, seen = 0.0, [], self.context
        timed = min(_TIMED, self._counted)
        before = subject.passes(context.cache, ids[:, :-timed]) if timed < ids.shape[1] else ()
        for fed in (*before, *ids[:, -timed:].split(1, dim=1)):
            started = time.perf_counter()
            logits.append(subject.feed(context.cache, fed))
            if fed.shape[1] == 1:
                seconds.append(time.perf_counter() - started)
            seen += fed.shape[1]
            report = kind.report(subject.model, context.cache, seen)
            most = max(most, report.used_bytes / report.full_bytes)
            # Of all that was said only the end counts, and a vocabulary is large.
            while sum(len(each) for each in logits[1:]) >= self._counted:
                logits.pop(0)
        return torch.cat(logits)[-self._counted :], most, seconds[-timed:]
