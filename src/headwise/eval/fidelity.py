"""Fidelity: a passage, its beginning compressed -> how far the predictions of what follows move from the full cache's.

The tokens after the context are fed as if one at a time, exactly as generation would, whatever the model would have
said itself (teacher forcing). What the context's last token predicts comes from the pass that reads the context, before
anything is compressed, so it cannot differ: the first prediction that counts is the one after the first fed token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from headwise.eval.cache_kinds import CacheKind
from headwise.eval.passages import Passages
from headwise.eval.server import Served, ServedPrompt, Server
from headwise.eval.task import Item, Measured, Subject, measured_served
from headwise.hosts.vllm.options import Options
from headwise.types import Float, Int, Tensor


@dataclass(frozen=True)
class Fidelity(Passages):
    """Continuation of real text on the compressed cache, compared with the full cache. Metrics, per passage:

    `kl`: mean Kullback-Leibler divergence of the compressed cache's predictions from the full cache's, nats per
    token. `nll_change`: how much less likely the text's own next token became, nats per token. `perplexity_ratio`:
    perplexity over that of the full cache, the exponential of `nll_change`. `top1`: share of predictions whose
    likeliest token is the same.
    """

    name: ClassVar[str] = "fidelity"
    primary: ClassVar[str] = "kl"
    higher_is_better: ClassVar[bool] = False
    through_server: ClassVar[bool] = True

    def reference(self, subject: Subject, item: Item) -> Float[Tensor, "steps vocabulary"]:
        """Log-probabilities of the full cache, from one pass over the passage."""
        ids = self.ids(subject, item)[:, :-1]
        subject.check_room(ids.shape[-1])
        with torch.inference_mode():
            logits: Tensor = subject.model(input_ids=ids, use_cache=False).logits[0, self.context :]
        return logits.float().log_softmax(dim=-1)

    def measure(
        self, subject: Subject, item: Item, kind: CacheKind, reference: Float[Tensor, "steps vocabulary"]
    ) -> Measured:
        """Compress the context, and feed the rest."""
        ids = self.ids(subject, item)
        context = subject.read(ids[:, : self.context], kind)
        rows = subject.feed(context.cache, ids[:, self.context : -1]).float().log_softmax(dim=-1)
        metrics, nll = compare(reference, rows, ids[0, self.context + 1 :])
        return context.measured(metrics, nll=nll, document=item.data["document"], start=item.data["start"])

    def prompt_tokens(self, item: Item) -> int:
        """The context."""
        return self.context

    def reference_served(self, server: Server, item: Item) -> Float[Tensor, "steps vocabulary"]:
        """Log-probabilities of the full cache."""
        return self._followed(server, item, None)[0]

    def measure_served(
        self, server: Server, item: Item, prompt: ServedPrompt, reference: Float[Tensor, "steps vocabulary"]
    ) -> Measured:
        """Give the context as a prompt, and let the rest be written."""
        rows, served = self._followed(server, item, prompt.options)
        metrics, nll = compare(reference, rows, torch.tensor(item.data["ids"][self.context + 1 :]))
        details = {"nll": nll, "document": item.data["document"], "start": item.data["start"]}
        return measured_served(prompt, served, metrics, **details)

    def _followed(self, server: Server, item: Item, options: Options | None) -> tuple[Tensor, Served]:
        ids = item.data["ids"]
        served = server.write(ids[: self.context], self.steps + 1, options, ids[self.context :], rows=True)
        assert served.rows is not None
        # What the context's last token predicts is left out, as above.
        return served.rows[1:], served


def compare(
    full: Float[Tensor, "n vocabulary"], ours: Float[Tensor, "n vocabulary"], targets: Int[Tensor, " n"]
) -> tuple[dict[str, float], float]:
    """The metrics of two caches' log-probabilities, and the mean negative log-likelihood of ours."""
    # Of equal predictions, rounding could take it below 0.
    divergence = F.kl_div(ours, full, reduction="none", log_target=True).sum(dim=-1).clamp(min=0)
    nll, full_nll = (float(F.nll_loss(rows, targets)) for rows in (ours, full))
    metrics = {
        "kl": float(divergence.mean()),
        "nll_change": nll - full_nll,
        "perplexity_ratio": math.exp(nll - full_nll),
        "top1": float((full.argmax(dim=-1) == ours.argmax(dim=-1)).float().mean()),
    }
    return metrics, nll
