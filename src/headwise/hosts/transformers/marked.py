"""Marked: texts or chats and what a user marks in them -> ids for the model, and which of these are marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from headwise.errors import ConfigurationError, InputError
from headwise.steer.spans import Marked, SpanLike, TokenRange, character_ranges, joined, token_ranges

# A text, or a chat as `apply_chat_template` takes it.
Text = str | Sequence[Mapping[str, Any]]


def encode_marked(
    tokenizer: PreTrainedTokenizerBase,
    texts: Text | Sequence[Text],
    spans: Sequence[SpanLike] | Sequence[Sequence[SpanLike]],
    *,
    add_generation_prompt: bool = True,
    add_special_tokens: bool | None = None,
) -> tuple[BatchEncoding, Marked]:
    """Tokenise texts or chats, padded on the left, and find what is marked in them.

    Args:
        texts: one, or several; a chat is written out by the tokenizer's template, and searched as that wrote it.
        spans: what is marked in the one text, or for each of several; nothing may be marked. A text stands for its
            first occurrence, `Span` for another one, two numbers for characters from and up to, and `TokenRange` for
            tokens, counted without padding.
        add_generation_prompt: whether a chat ends with the beginning of the answer.
        add_special_tokens: whether the tokenizer adds its own; None for of texts, whereas chats have those of the
            template.

    Returns:
        `input_ids` and `attention_mask`, for the model, and what `HeadwiseCache.mark` takes.

    Raises:
        InputError: when a span is not in its text, or there are spans for another number of texts.
        ConfigurationError: when the tokenizer does not tell where its tokens are in the text.
    """
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"{type(tokenizer).__name__} does not tell which characters its tokens stand for; use a fast tokenizer, or "
            "give ranges of tokens to Marked"
        )
    one = isinstance(texts, str) or _is_chat(texts)
    several: Sequence[Any] = [texts] if one else texts
    marked: Sequence[Any] = [spans] if one else spans
    if len(several) != len(marked):
        raise InputError(f"there are {len(several)} texts, and spans for {len(marked)}")
    rows = []
    for text, own in zip(several, marked, strict=True):
        chat = not isinstance(text, str)
        if chat:
            text = tokenizer.apply_chat_template(
                list(text), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        special = not chat if add_special_tokens is None else add_special_tokens
        rows.append(_row(tokenizer, str(text), own, special))
    longest, ids, mask, ranges = max(len(own) for own, _ in rows), [], [], []
    padding = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    for own, found in rows:
        before = longest - len(own)
        ids.append([padding] * before + own)
        mask.append([0] * before + [1] * len(own))
        ranges.append(tuple((start + before, stop + before) for start, stop in found))
    encoded = BatchEncoding({"input_ids": ids, "attention_mask": mask}, tensor_type="pt")
    return encoded, Marked(tuple(ranges), longest)


def _is_chat(texts: Any) -> bool:
    return isinstance(texts, Sequence) and len(texts) > 0 and isinstance(texts[0], Mapping)


def _row(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[SpanLike], special: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text, and the ranges of those that are marked."""
    if isinstance(spans, str):
        raise InputError(f"spans are given as a list of them, got {spans!r}")
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    ranges = []
    for span in spans:
        if isinstance(span, TokenRange):
            if not 0 <= span.start < span.stop <= len(ids):
                raise InputError(f"tokens {span.start} to {span.stop} are marked, and the text has {len(ids)}")
            ranges.append((span.start, span.stop))
        else:
            ranges += token_ranges(offsets, character_ranges(text, span))
    return ids, joined(ranges)
