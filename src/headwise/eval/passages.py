"""Passages: texts -> items of two parts, a context that is compressed and the tokens that are then fed one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.eval.task import Item, Subject, Task
from headwise.measure.texts import read_documents, take_passages
from headwise.policies.checks import check_count
from headwise.types import Int, Tensor

# Asks for the tokenizer's own first token.
BOS = "bos"


@dataclass(frozen=True)
class Passages(Task):
    """A task on passages of real text.

    Args:
        files: UTF-8 texts; Python's manual where there are none.
        context: tokens that are read at once and compressed, a first token included.
        steps: tokens that are then fed, each of which predicts the next.
        passages: of every file.
        first_token: id to put before every passage, "bos" for the tokenizer's; None for nothing.
        undo_marks: write WikiText's `@-@`, `@,@` and `@.@` as the signs they stand for, and `<unk>` as a word.

    Raises:
        ConfigurationError: for a count below 1.
    """

    files: tuple[Path, ...] = ()
    context: int = 2048
    steps: int = 128
    passages: int = 8
    first_token: int | str | None = None
    undo_marks: bool = False

    def __post_init__(self) -> None:
        for name in ("context", "steps", "passages"):
            check_count(name, getattr(self, name), 1)

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """Passages at equal steps through every file.

        Raises:
            InputError: when a file cannot be read or is too short.
            ConfigurationError: when the tokenizer lacks the first token asked for.
        """
        first = self._first(tokenizer)
        documents = read_documents(self.files, self.undo_marks)
        # One more than is fed: the last prediction has its token too.
        length = self.context + self.steps + 1 - len(first)
        passages = take_passages(tokenizer, documents, length, self.passages)
        return [
            Item(f"{number:05d}", {"document": p.document, "start": p.start, "ids": first + p.ids})
            for number, p in enumerate(passages)
        ]

    def ids(self, subject: Subject, item: Item) -> Int[Tensor, "1 t"]:
        """All tokens of the passage, on the model's device."""
        return torch.tensor([item.data["ids"]], device=subject.model.device)

    def _first(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if self.first_token is None:
            return []
        token = tokenizer.bos_token_id if self.first_token == BOS else self.first_token
        if not isinstance(token, int) or not 0 <= token < len(tokenizer):
            wanted = f"a token id below {len(tokenizer):,}, or {BOS!r} where the tokenizer has one"
            raise ConfigurationError(f"the first token must be {wanted}, got {self.first_token!r}")
        return [token]
