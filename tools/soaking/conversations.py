"""Conversations: a seed -> what is done with one cache, turn by turn; played plainly, and with everything that happens.

What happens beside turns must change nothing: files, copies, other callers, errors from inside layers, interruptions.
"""

from __future__ import annotations

import contextlib
import copy
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

import headwise
from headwise.hosts.transformers.attention import active_cache
from headwise.policies.base import Policy
from soaking.small_models import PAD, VOCABULARY

Kept = list[tuple[torch.Tensor, torch.Tensor]]

POLICIES: list[Policy] = [
    headwise.Full(),
    headwise.StreamingLLM(window=9, sinks=3),
    headwise.H2O(heavy=6, recent=6),
    headwise.H2O(heavy=0.3, recent=0.2),
    headwise.SnapKV(keep=0.5),
    headwise.SnapKV(keep=0.5, of="prompt"),
    headwise.RKV(keep=9, window=3, choose_every=5),
    headwise.AdaKV(keep=0.4, over=headwise.TOVA(0.4), choose_every=4),
    headwise.Quantized(headwise.SnapKV(keep=12, window=4, choose_every=7), 8, recent=4),
    headwise.TOVA(keep=0.4),
    headwise.KeyNorm(keep=12),
    headwise.AdaKV(keep=0.4, over="snapkv"),
    headwise.Random(keep=0.5, seed=1),
    headwise.Quantized(headwise.Full(), 8, recent=8),
    headwise.Quantized(headwise.H2O(heavy=12, recent=9), 8, recent=4),
]


class Differs(Exception):
    """Something was not what it is without all that happened."""


@dataclass(frozen=True)
class Step:
    """One thing that is done, and its number: of new words, of tokens that go, or the order of sequences."""

    kind: str
    words: tuple[tuple[int, ...], ...] = ()
    count: int = 0
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A model, a policy, options of the cache and what is done with it."""

    model: PreTrainedModel
    policy: Policy
    options: dict[str, int]
    padding: tuple[int, ...]
    steps: tuple[Step, ...]

    def cache(self) -> headwise.HeadwiseCache:
        """A new one."""
        return headwise.HeadwiseCache(self.model, self.policy, **self.options)


def draw(models: list[PreTrainedModel], dice: random.Random) -> Conversation:
    """Any conversation."""
    policy, batch = dice.choice(POLICIES), dice.randint(1, 3)
    steps, longest = [], dice.randint(12, 60)
    padding = tuple(0 if row == 0 else dice.randint(0, 10) for row in range(batch))
    model = dice.choice(models)
    takes_back = isinstance(policy, headwise.Full) and model.config.model_type != "gemma3_text"
    for turn in range(dice.randint(1, 4)):
        length = dice.randint(1, 9) if turn else longest
        words = tuple(tuple(dice.randrange(3, VOCABULARY) for _ in range(length)) for _ in range(batch))
        steps.append(Step("turn", words, dice.randint(1, 12)))
        if takes_back and dice.random() < 0.4:
            steps.append(Step("crop", count=dice.randint(1, 6)))
        if dice.random() < 0.3:
            order = tuple(dice.randrange(batch) for _ in range(dice.randint(1, 3)))
            steps.append(Step("select", order=order))
            batch = len(order)
    options = {"page_size": dice.choice([4, 16]), "evict_every": dice.choice([1, 4, 16])}
    return Conversation(model, policy, options, padding, tuple(steps))


def play(talk: Conversation, cache: object, happenings: Happenings | None = None) -> Kept:
    """Ids after every turn, and the logits of what was generated in it."""
    ids = mask = None
    kept: Kept = []
    for step in talk.steps:
        if happenings is not None:
            cache = happenings.meanwhile(talk, cache, ids, mask)
        if step.kind == "turn":
            words = torch.tensor(step.words)
            real = torch.ones_like(words)
            if ids is None:
                for row, pads in enumerate(talk.padding):
                    words[row, :pads], real[row, :pads] = PAD, 0
            ids, mask = (new if old is None else torch.cat([old, new], 1) for old, new in ((ids, words), (mask, real)))
            ids, logits = answer(talk.model, cache, ids, mask, step.count)
            mask = torch.cat([mask, torch.ones(len(ids), step.count, dtype=mask.dtype)], 1)
            kept.append((ids, logits))
        elif step.kind == "crop":
            cache.crop(-step.count)
            ids, mask = ids[:, : -step.count], mask[:, : -step.count]
        else:
            order = torch.tensor(step.order)
            cache.batch_select_indices(order)
            ids, mask = ids[order], mask[order]
    return kept


def answer(model: PreTrainedModel, cache: object, ids: torch.Tensor, mask: torch.Tensor, count: int) -> tuple:
    """What plain `generate` gives."""
    given = {"attention_mask": mask, "past_key_values": cache, "max_new_tokens": count, "do_sample": False}
    told = model.generate(ids, **given, pad_token_id=PAD, return_dict_in_generate=True, output_logits=True)
    return told.sequences, torch.stack(told.logits, dim=1)


def compare(found: Kept, expected: Kept, what: str) -> int:
    """Compare two runs; returns tokens that were compared.

    Raises:
        Differs: for logits that are not close, or ids that differ though one was clearly the best.
    """
    compared = 0
    for turn, ((ids, logits), (other, theirs)) in enumerate(zip(found, expected, strict=True)):
        steps = logits.shape[1]
        for step in range(steps):
            gap = float((logits[:, step] - theirs[:, step]).abs().max())
            if not gap < 5e-3:
                raise Differs(f"{what}: logits of turn {turn}, token {step} are off by {gap:.3g}")
            at = ids.shape[1] - steps + step
            if not torch.equal(ids[:, at], other[:, at]):
                # Two words as good as one another: from here on the two say something else.
                return compared
            compared += len(ids)
    return compared


class Happenings:
    """All that happens beside turns.

    Attributes:
        counts: of each kind.
    """

    def __init__(self, dice: random.Random) -> None:
        self._dice, self.counts = dice, Counter[str]()

    def meanwhile(
        self, talk: Conversation, cache: object, ids: torch.Tensor | None, mask: torch.Tensor | None
    ) -> object:
        """Some of it; returns the cache that goes on."""
        if ids is None:
            return cache
        for kind in ("file", "copy", "error", "interruption", "other caller"):
            if self._dice.random() < 0.35:
                self.counts[kind] += 1
                cache = getattr(self, f"_{kind.replace(' ', '_')}")(talk, cache, ids, mask)
        return cache

    def _file(self, talk: Conversation, cache: headwise.HeadwiseCache, *_: object) -> object:
        with tempfile.TemporaryDirectory() as folder:
            cache.save(Path(folder) / "cache")
            return headwise.HeadwiseCache.load(Path(folder) / "cache", talk.model, talk.policy, **talk.options)

    def _copy(self, _: Conversation, cache: object, *__: object) -> object:
        return copy.deepcopy(cache)

    def _other_caller(self, talk: Conversation, cache: object, *_: object) -> object:
        words = torch.tensor([[self._dice.randrange(3, VOCABULARY) for _ in range(9)]])
        with torch.no_grad():
            talk.model(words, past_key_values=DynamicCache(config=talk.model.config))
        return cache

    def _error(self, talk: Conversation, cache: object, ids: torch.Tensor, mask: torch.Tensor) -> object:
        decoder = talk.model.get_decoder()
        layer = self._dice.choice(list(decoder.h if hasattr(decoder, "h") else decoder.layers))
        calls = self._dice.randint(1, 3)

        def fail(*_: object) -> None:
            nonlocal calls
            calls -= 1
            if calls == 0:
                raise ArithmeticError("thrown into a layer")

        handle = layer.register_forward_hook(fail)
        try:
            return self._broken_off(talk, cache, ids, mask, ArithmeticError)
        finally:
            handle.remove()

    def _interruption(self, talk: Conversation, cache: object, ids: torch.Tensor, mask: torch.Tensor) -> object:
        return self._broken_off(talk, cache, ids, mask, KeyboardInterrupt)

    def _broken_off(
        self, talk: Conversation, cache: object, ids: torch.Tensor, mask: torch.Tensor, error: type[BaseException]
    ) -> object:
        """Something else is done with a copy, and fails; then the copy must be refused, or be as good as the cache."""
        other = copy.deepcopy(cache)
        before = other.get_seq_length()
        new, real = torch.cat([ids, ids[:, :2]], 1), torch.cat([mask, torch.ones_like(mask[:, :2])], 1)
        seconds = self._dice.uniform(1e-4, 0.03) if error is KeyboardInterrupt else 0
        try:
            with interrupted_after(seconds):
                answer(talk.model, other, new, real, 4)
        except error:
            # The interruption may have come while this was being put back.
            torch.set_grad_enabled(True)
            if active_cache.get() is not None or talk.model.config._attn_implementation == "headwise":
                raise Differs(f"a pass that ended by {error.__name__} is still under way") from None
            if other.broken:
                self.counts["refused"] += 1
                self._refused(talk, other, ids)
            elif other.get_seq_length() == before:
                return other
        return cache

    def _refused(self, talk: Conversation, cache: object, ids: torch.Tensor) -> None:
        """It must be, and serve again after a reset."""
        try:
            answer(talk.model, cache, ids, torch.ones_like(ids), 1)
        except headwise.CacheStateError:
            pass
        else:
            raise Differs("a cache that was broken off goes on")
        cache.reset()
        mask = torch.ones_like(ids)
        again = [answer(talk.model, each, ids, mask, 2) for each in (cache, talk.cache())]
        compare([again[0]], [again[1]], "after a reset")


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """`KeyboardInterrupt` at that time, wherever the interpreter is; never for 0."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
