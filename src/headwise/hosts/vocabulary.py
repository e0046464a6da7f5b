"""Vocabulary: a tokenizer -> which of its tokens are special, and which are punctuation."""

from __future__ import annotations

import unicodedata

import torch
from transformers import PreTrainedTokenizerBase

from headwise.types import Kind, Tensor, UInt8


def is_punctuation(text: str) -> bool:
    """Whether a decoded token, stripped of blanks, is not empty and all Unicode category P."""
    text = text.strip()
    return bool(text) and all(unicodedata.category(character).startswith("P") for character in text)


def kinds_of_vocabulary(tokenizer: PreTrainedTokenizerBase) -> UInt8[Tensor, " vocabulary"]:
    """The kind of every token id."""
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    table = torch.zeros(size, dtype=torch.uint8, device="cpu")
    texts = tokenizer.batch_decode([[token] for token in range(size)], clean_up_tokenization_spaces=False)
    for token, text in enumerate(texts):
        if is_punctuation(text):
            table[token] |= int(Kind.PUNCTUATION)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token in special | set(tokenizer.all_special_ids):
        table[token] = int(Kind.SPECIAL)
    return table
