"""Likelihood: contexts and what follows them, as token ids -> how likely a compressed cache makes what follows.

One pass over context and continuation would measure nothing: in that pass every token still sees all others. So the
context is read and compressed first, but for its last token, and the continuation is then predicted on what is left.

    context   0 1 2 3 4           read in one pass and compressed: 0 1 2 3
    continuation      5 6 7       fed on the compressed cache:     4 5 6, which predict 5 6 7

A context of one token cannot be divided: it is read, and predicts the first token itself. The same goes for text
without context (perplexity), of which a beginning of a given length is read as the prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from headwise.eval.task import Subject
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.policies.base import Policy
from headwise.policies.size import Size
from headwise.report.report import Report
from headwise.types import Float, Int, Tensor


@dataclass(frozen=True)
class Stretch:
    """Tokens to be scored, and what comes before them.

    Attributes:
        prompt: read in one pass.
        fed: then fed on the compressed cache.
        targets: what the last so many of those tokens should predict, one each.
    """

    prompt: tuple[int, ...]
    fed: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """How likely the targets are.

    Attributes:
        log_likelihood: of all of them, in nats.
        greedy: whether each of them is the likeliest token in its place.
    """

    log_likelihood: float
    greedy: bool


def cut(context: Sequence[int], continuation: Sequence[int], prompt: Size = 0) -> Stretch:
    """Where the prompt ends and feeding begins.

    Args:
        context: at least one token.
        continuation: at least one token.
        prompt: read at least so many tokens (int), or that share of all (float), though they are to be scored.
    """
    inputs = (*context, *continuation[:-1])
    least = prompt if isinstance(prompt, int) else round(prompt * len(inputs))
    end = min(max(1, len(context) - 1, least), len(inputs))
    return Stretch(inputs[:end], inputs[end:], tuple(continuation))


def score(
    subject: Subject, policy: Policy, stretches: Sequence[Stretch], on_prompt: Callable[[Report], object]
) -> Iterator[tuple[int, Score]]:
    """The scores as they come, each with its place in `stretches`.

    A prompt that several share is read and compressed once; so is what several feed behind it, as do the choices of
    a question that are one token each.

    Args:
        on_prompt: told about every compressed prompt.
    """
    for prompt, sharers in _grouped(stretches, range(len(stretches)), "prompt"):
        rows = max(len(stretches[place].targets) - len(stretches[place].fed) for place in sharers)
        tail, cache = _read(subject, policy, prompt, max(1, rows))
        on_prompt(cache.report())
        branches = _grouped(stretches, sharers, "fed")
        for number, (fed, places) in enumerate(branches, start=1):
            # The last branch needs no copy: nobody comes after it.
            branch = copy.deepcopy(cache) if number < len(branches) else cache
            logits = torch.cat([tail, subject.feed(branch, _tensor(subject, fed))]) if fed else tail
            for place in places:
                yield place, _compare(logits, stretches[place].targets)


def _grouped(
    stretches: Sequence[Stretch], places: Iterable[int], part: Literal["prompt", "fed"]
) -> list[tuple[tuple[int, ...], list[int]]]:
    """The places of stretches that have that part in common, in the order in which each part first appears."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place in places:
        groups.setdefault(getattr(stretches[place], part), []).append(place)
    return list(groups.items())


def _read(
    subject: Subject, policy: Policy, prompt: tuple[int, ...], rows: int
) -> tuple[Float[Tensor, "rows vocabulary"], HeadwiseCache]:
    """Logits of the prompt's last so many tokens, and the cache it is compressed in."""
    told = {"tokenizer": subject.tokenizer, "prompt_tokens": len(prompt)}
    cache = HeadwiseCache(subject.model, policy, **told, **subject.options)
    with torch.inference_mode():
        output = subject.model(input_ids=_tensor(subject, prompt), past_key_values=cache, logits_to_keep=rows)
    return output.logits[0], cache


def _compare(logits: Float[Tensor, "n vocabulary"], targets: tuple[int, ...]) -> Score:
    """The last of the logits against the targets."""
    wanted = torch.tensor(targets, device=logits.device)
    rows = logits[-len(targets) :].float().log_softmax(dim=-1)
    chosen = rows.gather(1, wanted[:, None])
    return Score(float(chosen.sum()), bool((rows.argmax(dim=-1) == wanted).all()))


def _tensor(subject: Subject, ids: tuple[int, ...]) -> Int[Tensor, "1 t"]:
    return torch.tensor([ids], device=subject.model.device)
