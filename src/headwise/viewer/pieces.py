"""Pieces: token ids -> the piece of text that each adds, all of which together are the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a character decodes to before all of its tokens are there, and after how many it is given up.
_UNFINISHED, _PATIENCE = "\ufffd", 8


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of every token, special ones included; where several make one character, the last of them has it.

    Each is what the text grows by, because a tokenizer may spell a token differently by what comes before it.
    """
    found: list[str] = []
    # Tokens from `known` on are decoded again and again; the text up to `written` of them is known.
    known = written = 0
    before = ""
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[known:end])
        if text.endswith(_UNFINISHED) and end - written < _PATIENCE:
            found.append("")
            continue
        found.append(text[len(before) :])
        known, written = written, end
        before = _decode(tokenizer, ids[known:end])
    if found and not found[-1]:
        found[-1] = _decode(tokenizer, ids[known:])[len(before) :]
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
