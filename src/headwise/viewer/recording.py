"""Recording: a model, a prompt and a cache -> what every head holds after the prompt and while the answer is written.

And how much of the attention that a full cache would pay goes to what is held, at each of these moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.policies.frequent import Frequent
from headwise.store.store import RowStore
from headwise.types import Int, Tensor
from headwise.viewer.holdings import GONE, Holdings, cells_of, formats_of
from headwise.viewer.pieces import pieces


@dataclass(frozen=True)
class Recording:
    """One policy on one prompt.

    Attributes:
        policy: as Python would build it.
        formats: names of the ways rows are stored, exact ones first, and bits of a number on average.
        cells: layer and KV head of each of the c heads.
        pieces: text of every token, of the prompt and of the answer.
        prompt: tokens of the prompt.
        moments: what is held after the prompt, then while the answer is written, and at its end.
        attention: at every moment, of each head, the share of all attention so far of a full cache's queries that went
            to the tokens that are held.
    """

    policy: str
    formats: list[tuple[str, float]]
    cells: list[tuple[int, int]]
    pieces: list[str]
    prompt: int
    moments: list[Holdings]
    attention: list[list[float]]


def record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "1 t"],
    make: Callable[[], HeadwiseCache],
    new_tokens: int,
    moments: int,
    told: Callable[[str], None] = lambda what: None,
) -> Recording:
    """Let the model read a prompt and answer, the likeliest token each time, and note what the cache holds.

    Args:
        make: an empty cache.
        new_tokens: of the answer, at most; 0 for none.
        moments: at which it is looked at, at most; the first is the end of the prompt.
        told: takes a word on what is done next.
    """
    cache, prompt = make(), ids.shape[1]
    told("reading")
    everything, held = _answer(model, ids.to(model.device), cache, new_tokens, moments)
    told("reading again with a full cache")
    # Its last token was not read.
    attention = _attention(model, everything[:, : held[-1].seen], held)
    text = pieces(tokenizer, everything[0, : held[-1].seen].tolist())
    return Recording(str(cache.policy), formats_of(cache), cells_of(cache), text, prompt, held, attention)


class _Watch:
    """A streamer for `generate()` that looks at a cache whenever so many tokens have come."""

    def __init__(self, cache: HeadwiseCache, every: int) -> None:
        self._cache, self._every, self._passes = cache, every, -1
        self.held: list[Holdings] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt before it is read, then with every new token."""
        self._passes += 1
        if self._passes and (self._passes - 1) % self._every == 0:
            self.look()

    def end(self) -> None:
        """Called after the last token."""
        if self.held[-1].seen < self._cache.get_seq_length():
            self.look()

    def look(self) -> None:
        """Note what there is."""
        self.held.append(Holdings.of(self._cache))


def _answer(
    model: PreTrainedModel, ids: Int[Tensor, "1 t"], cache: HeadwiseCache, new_tokens: int, moments: int
) -> tuple[Int[Tensor, "1 all"], list[Holdings]]:
    if not new_tokens:
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        return ids, [Holdings.of(cache)]
    watch = _Watch(cache, max(1, math.ceil(new_tokens / max(1, moments - 1))))
    everything = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        streamer=watch,
        max_new_tokens=new_tokens,
        do_sample=False,
        # A model's own settings may ask for beams, which cannot be streamed.
        num_beams=1,
    )
    return everything, watch.held


def _attention(model: PreTrainedModel, ids: Int[Tensor, "1 t"], held: Sequence[Holdings]) -> list[list[float]]:
    """Shares by a cache that keeps everything and adds up what every token is paid."""
    # What is evicted is looked at after every token of the answer; there is nothing to evict.
    cache = HeadwiseCache(model, Frequent(size=1.0), prompt_tokens=held[0].seen, evict_every=ids.shape[1] + 1)
    shares, seen = [], 0
    for moment in held:
        with torch.no_grad():
            model(input_ids=ids[:, seen : moment.seen], past_key_values=cache, use_cache=True)
        seen = moment.seen
        paid = np.concatenate([_paid(layer.core.store, seen) for layer in cache.headwise_layers])
        kept = np.where(moment.held == GONE, 0, paid).sum(axis=1)
        shares.append((kept / paid.sum(axis=1)).tolist())
    return shares


def _paid(store: RowStore | None, seen: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """What every token of every head was paid."""
    assert store is not None
    scores, columns = store.kept_scores(), store.kept_columns()
    assert scores is not None
    paid = np.zeros((store.heads[1], seen))
    np.put_along_axis(paid, columns[0].cpu().long().numpy(), scores[0].cpu().double().numpy(), axis=1)
    return paid
