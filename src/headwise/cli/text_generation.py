"""Text generation: a model, a prompt and a cache -> new tokens, their text, and the seconds they took."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwise.cli.progress import waiting
from headwise.cli.streaming import TextStream
from headwise.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from headwise.types import Tensor

_SEEDS = 2**32

_WORD = re.compile(r"\s*\S*")


@dataclass(frozen=True)
class Sampling:
    """How new tokens are drawn.

    Attributes:
        temperature: 0 always takes the likeliest token.
        seed: of the draw; a comparison uses it for both runs.
        prefill_chunk: prompt tokens per forward pass; None gives the whole prompt in one.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigurationError(f"the temperature must be 0 or more, got {self.temperature}")
        if not 0 <= self.seed < 2**64:
            raise ConfigurationError(f"the seed must be from 0 to 2**64 - 1, got {self.seed}")

    def options(self) -> dict[str, Any]:
        """As `generate()` calls them."""
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        return {
            **drawn,
            "max_new_tokens": self.max_new_tokens,
            "prefill_chunk_size": self.prefill_chunk,
            # A model's own settings may ask for beams, which cannot be streamed.
            "num_beams": 1,
        }


def any_seed(seed: int | None) -> int:
    """The seed given, or one drawn where there is none."""
    return random.randrange(_SEEDS) if seed is None else seed


@dataclass(frozen=True)
class Generated:
    """What came of one call of `generate()`.

    Attributes:
        first: seconds until the first new token.
        rest: seconds from then on.
    """

    token_ids: list[int]
    text: str
    first: float
    rest: float


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    cache: Cache,
    sampling: Sampling,
    write: Callable[[str], object],
) -> Generated:
    """Generate, passing pieces of text to `write` as they come.

    Raises:
        InputError: when the device has too little memory.
    """
    import torch

    ids = ids.to(model.device)
    torch.manual_seed(sampling.seed)
    started = time.perf_counter()
    try:
        new = ids.shape[-1] - int(cache.get_seq_length())
        with waiting(f"reading {new:,} tokens") as arrived:

            def pass_on(piece: str) -> None:
                arrived()
                write(piece)

            stream = TextStream(tokenizer, pass_on)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                streamer=stream,
                **sampling.options(),
            )
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory with {ids.shape[-1]} prompt tokens; try --prefill-chunk, --dtype bfloat16 or less text"
        ) from error
    finished = time.perf_counter()
    first = finished if stream.first_token_at is None else stream.first_token_at
    return Generated(stream.token_ids, stream.text, first - started, finished - first)


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Index of the first token in which two texts differ; the end of the shorter counts, None when they are equal."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


def differing_words(one: str, other: str) -> tuple[str, str]:
    """The word of each text in which they first differ; empty where a text has ended before."""
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    # Back to where the word begins, if the difference is inside one.
    inside = any(text[common : common + 1].strip() for text in (one, other))
    while inside and common and not one[common - 1].isspace():
        common -= 1
    left, right = (_WORD.match(text, common).group() for text in (one, other))  # type: ignore[union-attr]  # matches any text
    if left.strip() == right.strip():
        # Only the space between the words differs, so it is shown, line breaks as \n.
        return repr(left)[1:-1], repr(right)[1:-1]
    return left.strip(), right.strip()


def stock_memory(cache: Cache) -> dict[str, int]:
    """Bytes of transformers' own cache, under the names of a report."""
    from headwise.measure.stock_caches import held_by

    held = held_by(cache)
    return {
        "used_bytes": held.used_bytes,
        "allocated_bytes": held.allocated_bytes,
        "full_bytes": held.used_bytes,
    }
