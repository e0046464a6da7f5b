"""Streaming: tokens as `generate()` makes them -> pieces of text as soon as they are whole, and when it began."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwise.types import Tensor

# What a character decodes to before all of its tokens are there.
_UNFINISHED = "\ufffd"


class TextStream:
    """A streamer for `generate()`: passes text on, remembers the tokens and the time of the first.

    All tokens are decoded every time: a tokenizer may spell a token differently by what comes before it. The pieces
    together are exactly the text of all tokens.

    Args:
        tokenizer: decodes.
        write: takes every piece of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self.token_ids: list[int] = []
        self.first_token_at: float | None = None
        self._tokenizer = tokenizer
        self._write = write
        self._prompt_is_in = False
        self._written = 0

    @property
    def text(self) -> str:
        """All tokens so far as text, without special tokens."""
        return decode(self._tokenizer, self.token_ids)

    def put(self, value: Tensor) -> None:
        """Called with the prompt first, then with every new token."""
        if not self._prompt_is_in:
            self._prompt_is_in = True
            return
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.token_ids += value.flatten().tolist()
        text = self.text
        if not text.endswith(_UNFINISHED):
            self._pass_on(text)

    def end(self) -> None:
        """Called after the last token."""
        self._pass_on(self.text)

    def _pass_on(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """Tokens as text, without special tokens and without tidying, so that more tokens only ever add to it."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
