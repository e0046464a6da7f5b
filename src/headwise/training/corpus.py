"""Corpus: texts and a tokenizer -> ids of any part of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwise.measure.texts import Document


class Corpus:
    """Texts as tokens.

    Attributes:
        lengths: tokens of every text.
        about: the texts by name, hash and length, as JSON can hold them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document]) -> None:
        self._first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._tokens: list[list[int]] = [
            tokenizer(text.text, add_special_tokens=False, verbose=False).input_ids for text in texts
        ]
        self.lengths = [len(tokens) for tokens in self._tokens]
        self.about: list[dict[str, Any]] = [
            {"name": text.name, "sha256": hashlib.sha256(text.text.encode()).hexdigest(), "tokens": length}
            for text, length in zip(texts, self.lengths, strict=True)
        ]

    def ids(self, text: int, start: int, length: int) -> list[int]:
        """So many tokens of a text; the first is what the tokenizer begins texts with, where there is such a token."""
        return self._first + self._tokens[text][start : start + length - len(self._first)]
