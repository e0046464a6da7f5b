"""Repetition: a prompt in a cache -> the model asked to repeat it, and what it looked at while it did.

KVzip (Kim et al., NeurIPS 2025, section 3.2), chunk by chunk; nothing of the repetition stays in the cache. Chunks are
cut by column: a padded sequence of several chunks is cut elsewhere than it would be alone, and may score otherwise.
A further prompt is repeated by itself, over what is left of everything before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from headwise.hosts.transformers.decoder import decoder_of
from headwise.hosts.transformers.rotary import steady_embeddings
from headwise.hosts.transformers.stock_layers import unchanged
from headwise.stages.layer import LayerCache
from headwise.stages.token_log import TokenLog
from headwise.types import Bool, Int, Tensor

# Columns that are repeated in one pass.
_CHUNK = 2048

# Of the chunk before, to say where the next one starts.
_CUE = 8

_FIRST = "\n\nRepeat the previous context exactly."
_LAST = "\n\nRepeat the last part of the previous context exactly."
_NEXT = "\n\nRepeat the part of the previous context exactly, starting with"


def repeat_prompt(
    model: PreTrainedModel,
    cache: Cache,
    cores: Sequence[LayerCache],
    states: Sequence[dict[Any, Any]],
    log: TokenLog,
    ids: Int[Tensor, "b t"],
    first: int,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Let the model repeat its prompt; every layer then knows the largest attention that each column got.

    Args:
        cache: with the whole prompt in it, uncompressed; or with a further one behind what was chosen.
        cores: its compressed layers.
        states: what passes change beside them.
        ids: the prompt, padding included.
        first: column of the first of them.
    """
    decoder, device = decoder_of(model), ids.device
    seen = first + ids.shape[1]
    real = log.real(torch.arange(seen, device=device).expand(len(ids), 1, -1))[:, 0]
    opening = _answer_opening(tokenizer)
    for start in range(0, ids.shape[1], _CHUNK):
        chunk = slice(start, min(start + _CHUNK, ids.shape[1]))
        columns = slice(first + chunk.start, first + chunk.stop)
        request = _NEXT if start else _LAST if first else _FIRST
        asked, counted = _request(tokenizer, request, ids, real[:, first:], start, opening)
        repetition = torch.cat([asked, ids[:, chunk]], dim=1)
        mask = torch.cat([real, counted, real[:, columns]], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, seen:]
        with _repeating(cores, columns), unchanged(states), steady_embeddings(decoder), torch.no_grad():
            decoder(
                input_ids=repetition,
                attention_mask=None if bool(mask.all()) else mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )


@contextmanager
def _repeating(cores: Sequence[LayerCache], chunk: slice) -> Iterator[None]:
    """While it lasts, passes read those layers and leave nothing in them."""
    for core in cores:
        core.repetition_chunk = chunk
    try:
        yield
    finally:
        for core in cores:
            core.repetition_chunk = None


def _request(
    tokenizer: PreTrainedTokenizerBase,
    request: str,
    ids: Int[Tensor, "b t"],
    real: Bool[Tensor, "b t"],
    start: int,
    opening: list[int],
) -> tuple[Int[Tensor, "b q"], Bool[Tensor, "b q"]]:
    """What is said before a chunk is repeated, and which of it is no padding."""

    def row(tokens: list[int]) -> tuple[Tensor, Tensor]:
        words = torch.tensor(tokens, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        return words, torch.ones_like(words, dtype=torch.bool)

    text = tokenizer(request, add_special_tokens=False).input_ids
    before = slice(max(0, start - _CUE), start)
    parts = [row(text), (ids[:, before], real[:, before]), row(opening)]
    return torch.cat([words for words, _ in parts], dim=1), torch.cat([counted for _, counted in parts], dim=1)


def _answer_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end the user's turn and begin the model's; a line break where there is no chat template."""
    if not tokenizer.chat_template:
        return list(tokenizer("\n", add_special_tokens=False).input_ids)
    content = "context"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(str(chat).rpartition(content)[2], add_special_tokens=False).input_ids)
