"""Corpus: texts and a tokenizer -> ids of any part of them, for what is trained on a model; and how its runs go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.eval.text import Document

_STATE = "run.json"


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


def model_name(model: PreTrainedModel) -> str:
    """A Hub id as it is, and of a folder only its own name."""
    name = str(model.config.name_or_path or type(model).__name__)
    return Path(name).name if Path(name).is_dir() else name


def begin_run(work: Path, about: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder of a run, or see that what lies there is the same run.

    Raises:
        ConfigurationError: when it holds another run, or one that is not to be gone on with.
    """
    state, path = json.dumps(about, indent=2), work / _STATE
    if path.is_file():
        if not resume:
            raise ConfigurationError(f"{str(work)!r} holds an unfinished run: --resume it, or remove it")
        if path.read_text(encoding="utf-8") != state:
            raise ConfigurationError(f"{str(work)!r} holds a run with other options; remove it, or use those")
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(state, encoding="utf-8")
