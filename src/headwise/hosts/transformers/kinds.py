"""Kinds: a tokenizer, placeholders and token ids -> which tokens are special, punctuation, or stand for media."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.hosts.transformers.placeholders import placeholders
from headwise.hosts.vocabulary import kinds_of_vocabulary
from headwise.policies.base import Policy
from headwise.stages.token_log import TokenLog
from headwise.types import Bool, Int, Kind, Tensor, UInt8

# Reading a vocabulary takes about half a second, so it is done once per tokenizer.
_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, Tensor] = WeakKeyDictionary()


class KindTable:
    """The kind of every token id, and the markers that several ids make together.

    Args:
        tokenizer: says how ids decode and which are special; None where nobody asks for that.
        markers: texts such as "[INST]" that count as special wherever their ids appear in a row.
        placeholders: ids in the place of which a model sees or hears. For a tokenizer they are special; to a rule that
            keeps what structures a text they are not, or it would keep every patch of every image.

    Raises:
        ConfigurationError: for a marker without tokens, or without a tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        markers: Sequence[str] = (),
        placeholders: Collection[int] = (),
    ) -> None:
        self._table = torch.zeros(1, dtype=torch.uint8, device="cpu")
        if tokenizer is not None:
            if tokenizer not in _TABLES:
                _TABLES[tokenizer] = kinds_of_vocabulary(tokenizer)
            self._table = _TABLES[tokenizer]
        if placeholders:
            missing = max(0, max(placeholders) + 1 - len(self._table))
            self._table = torch.nn.functional.pad(self._table, (0, missing)).clone()
            self._table[list(placeholders)] = int(Kind.MEDIA)
        self._markers = _marker_ids(tokenizer, markers)
        # Every id so far; kept only where markers, which may span two passes, are looked for.
        self.ids: Int[Tensor, "b t"] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of what it takes every token and marker for."""
        digest = hashlib.sha256(self._table.cpu().numpy().tobytes())
        digest.update(repr([marker.tolist() for marker in self._markers]).encode())
        return digest.hexdigest()

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
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        return self._find(self.ids[:, -(ids.shape[1] + self._reach) :])

    def newest(self) -> UInt8[Tensor, "b recent"] | None:
        """Kinds of the newest columns that a marker taken back might have been part of; None without markers."""
        if self.ids is None or not self._reach:
            return None
        around = self.ids[:, -2 * self._reach :]
        found = self._find(around).to(torch.uint8) * int(Kind.SPECIAL)
        return (self.kinds(around) | found)[:, -self._reach :]

    def announce(self, ids: Int[Tensor, "b q"] | None, log: TokenLog) -> None:
        """Tell the log what the tokens are that the coming forward pass will process.

        Args:
            ids: None where the model was called without.
        """
        log.announce(None if ids is None else self.kinds(ids))
        marked = None if ids is None else self.marked(ids)
        if marked is not None:
            log.mark(marked, int(Kind.SPECIAL))

    def truncate(self, columns: int, log: TokenLog) -> None:
        """Forget the ids from that column on, and correct what the log has of markers that are cut by it."""
        if self.ids is not None and columns < self.ids.shape[1]:
            # The next prompt may have another number of sequences.
            self.ids = self.ids[:, :columns].clone() if columns else None
        newest = self.newest()
        if newest is not None:
            log.correct(newest)

    def fresh(self) -> KindTable:
        """The same table without any ids."""
        other = copy.copy(self)
        other.ids = None
        return other

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order."""
        if self.ids is not None:
            self.ids = self.ids[indices.to(self.ids.device)]

    @property
    def _reach(self) -> int:
        """Columns before a token in which a marker that ends with it may begin."""
        return max(map(len, self._markers), default=1) - 1

    def _find(self, ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Which columns belong to a marker."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for marker in self._markers:
            if ids.shape[1] < len(marker):
                continue
            hits = (ids.unfold(1, len(marker), 1) == marker.to(ids.device)).all(dim=-1)
            for offset in range(len(marker)):
                found[:, offset : offset + hits.shape[1]] |= hits
        return found


def kind_table(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, markers: Sequence[str]
) -> KindTable | None:
    """What a policy that chooses must know of the tokens of a model; None where it looks at no kinds.

    Raises:
        ConfigurationError: for a marker without tokens, or a policy about media where the model has none.
    """
    if not policy.reads_kinds:
        return None
    found = placeholders(model.config)
    if "media" in policy.facts and not found:
        raise ConfigurationError(
            f"{policy} keeps the tokens that stand for images, videos and sounds, and the configuration of "
            f"{type(model).__name__} has none (image_token_id, video_token_id, audio_token_id); take the policy inside"
        )
    return KindTable(tokenizer, markers, found)


def _marker_ids(tokenizer: PreTrainedTokenizerBase | None, markers: Sequence[str]) -> list[Int[Tensor, " marker"]]:
    if markers and tokenizer is None:
        raise ConfigurationError("markers are texts and need a tokenizer: HeadwiseCache(..., tokenizer=tokenizer)")
    found: dict[tuple[int, ...], None] = {}
    for marker in markers:
        assert tokenizer is not None
        # Tokenizers split a text differently at the start of a word and inside a line.
        spellings = [tokenizer.encode(text, add_special_tokens=False) for text in (marker, " " + marker)]
        if not marker.strip() or not spellings[0]:
            raise ConfigurationError(f"marker {marker!r} has no tokens")
        found.update({tuple(ids): None for ids in spellings})
    return [torch.tensor(ids, dtype=torch.long, device="cpu") for ids in found]
