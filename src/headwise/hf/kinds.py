"""Kinds: a tokenizer and token ids -> which tokens are special and which are punctuation."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.types import Bool, Int, Kind, Tensor, UInt8

# Reading a vocabulary takes about half a second, so it is done once per tokenizer.
_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, Tensor] = WeakKeyDictionary()


class KindTable:
    """The kind of every token id, and the markers that several ids make together.

    Args:
        tokenizer: says how ids decode and which are special.
        markers: texts such as "[INST]" that count as special wherever their ids appear in a row.

    Raises:
        ConfigurationError: for a marker without tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: Sequence[str] = ()) -> None:
        if tokenizer not in _TABLES:
            _TABLES[tokenizer] = _kinds_of_vocabulary(tokenizer)
        self._table = _TABLES[tokenizer]
        self._markers = _marker_ids(tokenizer, markers)
        # Every id so far; kept only where markers, which may span two passes, are looked for.
        self._ids: Int[Tensor, "b t"] | None = None

    def kinds(self, ids: Int[Tensor, "b q"]) -> UInt8[Tensor, "b q"]:
        """Kind of each token by itself; an id beyond the vocabulary is an ordinary token."""
        if self._table.device != ids.device:
            self._table = self._table.to(ids.device)
        known = ids.clamp(0, len(self._table) - 1)
        return self._table[known].masked_fill(known != ids, int(Kind.ORDINARY))

    def marked(self, ids: Int[Tensor, "b q"]) -> Bool[Tensor, "b recent"] | None:
        """Which of the newest columns belong to a marker; None without markers.

        Args:
            ids: the newest tokens. The answer also covers the columns before them in which a marker that ends in
                one of them may have begun.
        """
        if not self._markers:
            return None
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], dim=1)
        recent = self._ids[:, -(ids.shape[1] + max(map(len, self._markers)) - 1) :]
        found = torch.zeros_like(recent, dtype=torch.bool)
        for marker in self._markers:
            if recent.shape[1] < len(marker):
                continue
            hits = (recent.unfold(1, len(marker), 1) == marker.to(ids.device)).all(dim=-1)
            for offset in range(len(marker)):
                found[:, offset : offset + hits.shape[1]] |= hits
        return found

    def truncate(self, columns: int) -> None:
        """Forget the ids from that column on."""
        if self._ids is not None:
            self._ids = self._ids[:, :columns]

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order."""
        if self._ids is not None:
            self._ids = self._ids[indices.to(self._ids.device)]


def is_punctuation(text: str) -> bool:
    """Whether a decoded token, stripped of blanks, is not empty and all Unicode category P."""
    text = text.strip()
    return bool(text) and all(unicodedata.category(character).startswith("P") for character in text)


def _kinds_of_vocabulary(tokenizer: PreTrainedTokenizerBase) -> UInt8[Tensor, " vocabulary"]:
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    table = torch.zeros(size, dtype=torch.uint8)
    texts = tokenizer.batch_decode([[token] for token in range(size)], clean_up_tokenization_spaces=False)
    for token, text in enumerate(texts):
        if is_punctuation(text):
            table[token] |= int(Kind.PUNCTUATION)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token in special | set(tokenizer.all_special_ids):
        table[token] = int(Kind.SPECIAL)
    return table


def _marker_ids(tokenizer: PreTrainedTokenizerBase, markers: Sequence[str]) -> list[Int[Tensor, " marker"]]:
    found: dict[tuple[int, ...], None] = {}
    for marker in markers:
        # Tokenizers split a text differently at the start of a word and inside a line.
        spellings = [tokenizer.encode(text, add_special_tokens=False) for text in (marker, " " + marker)]
        if not marker.strip() or not spellings[0]:
            raise ConfigurationError(f"marker {marker!r} has no tokens")
        found.update({tuple(ids): None for ids in spellings})
    return [torch.tensor(ids) for ids in found]
