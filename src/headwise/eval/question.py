"""Question: a document, a question about it and what the answer must hold -> a prompt in two parts, and a score.

Both query modes give the model the very same tokens. "aware" compresses the whole prompt, question included; with
"agnostic" the document alone is compressed, and the question is read on the compressed cache.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.eval.cache_kinds import CacheKind
from headwise.eval.greedy import common_prefix, continue_greedily
from headwise.eval.server import ServedPrompt, Server
from headwise.eval.task import Context, Item, Measured, Query, Subject, Task, measured_served
from headwise.policies.checks import check_count
from headwise.types import Int, Tensor


@dataclass(frozen=True)
class Question:
    """Something to ask about a document.

    Attributes:
        cue: how the answer begins; given to models that have no chat template.
        expected: what the answer must hold.
        details: for the record; plain JSON values.
    """

    document: str
    question: str
    cue: str
    expected: Sequence[str]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuestionTask(Task):
    """A task of questions. Its metric `recall` is the share of what is expected that the greedy answer holds.

    Args:
        query: "aware" or "agnostic".
        context: tokens of the document, about.
        count: questions.
        new_tokens: length of the answer at the most.
        seed: of everything that is drawn.

    Raises:
        ConfigurationError: for a count below 1, or another query mode.
    """

    query: Query = "agnostic"
    context: int = 2048
    count: int = 16
    new_tokens: int = 24
    seed: int = 0

    primary: ClassVar[str] = "recall"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("context", "count", "new_tokens"):
            check_count(name, getattr(self, name), 1)
        if self.query == "none":
            raise ConfigurationError(f'{self.name} asks a question: query must be "aware" or "agnostic", got "none"')

    @abstractmethod
    def questions(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Question]:
        """What to ask; the same for both query modes.

        Raises:
            InputError: when there is too little text.
        """

    def limit(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
        """Tokens that the answer may take."""
        return self.new_tokens

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """One item per question."""
        return [
            Item(f"{number:05d}", self._data(tokenizer, question))
            for number, question in enumerate(self.questions(tokenizer))
        ]

    def measure(self, subject: Subject, item: Item, kind: CacheKind, reference: None) -> Measured:
        """Compress the context, read what is left of the prompt, and answer greedily."""
        ids = torch.tensor([item.data["ids"]], device=subject.model.device)
        subject.check_room(ids.shape[-1] + item.data["limit"])
        context = self.read(subject, item, kind, ids[:, : item.data["context"]])
        asked = _ask(subject, context, ids[:, item.data["context"] :])
        new = continue_greedily(subject, asked, item.data["limit"])
        answer = str(subject.tokenizer.decode(new, skip_special_tokens=True))
        metrics = {"recall": found(item.data["expected"], answer)}
        return context.measured(metrics, answer=answer, expected=item.data["expected"], **item.data["details"])

    def prompt_tokens(self, item: Item) -> int:
        """The document, and with it the question where it is there while compressing."""
        return int(item.data["context"])

    def measure_served(self, server: Server, item: Item, prompt: ServedPrompt, reference: None) -> Measured:
        """Give the context as a prompt, let the rest of it be written, and the answer behind it."""
        ids, end = item.data["ids"], item.data["context"]
        context, rest = ids[:end], ids[end:]
        served = server.write(context, len(rest) + item.data["limit"], prompt.options, rest)
        answer = str(server.tokenizer.decode(served.ids[len(rest) :], skip_special_tokens=True))
        metrics = {"recall": found(item.data["expected"], answer)}
        details = {"answer": answer, "expected": item.data["expected"], **item.data["details"]}
        return measured_served(prompt, served, metrics, **details)

    def read(self, subject: Subject, item: Item, kind: CacheKind, ids: Int[Tensor, "1 t"]) -> Context:
        """Read and compress the context."""
        return subject.read(ids, kind)

    def _data(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> dict[str, Any]:
        ids, context = encode_question(tokenizer, question)
        return {
            "ids": ids,
            "context": len(ids) if self.query == "aware" else context,
            "limit": self.limit(tokenizer, question),
            "expected": list(question.expected),
            "details": question.details,
        }


def encode_question(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[list[int], int]:
    """The prompt's token ids, in the chat template where there is one, and how many of them precede the question.

    A token that has characters of both belongs to the question.
    """
    if tokenizer.chat_template is None:
        text = f"{question.document}\n\nQuestion: {question.question}\nAnswer: {question.cue}"
    else:
        message = {"role": "user", "content": f"{question.document}\n\n{question.question}"}
        text = str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    # A chat template writes the first token itself.
    options = {"add_special_tokens": tokenizer.chat_template is None, "verbose": False}
    whole = list(tokenizer(text, **options)["input_ids"])
    before = list(tokenizer(text[: text.rindex(question.question)], **options)["input_ids"])
    return whole, common_prefix(before, whole)


def found(expected: Sequence[str], answer: str) -> float:
    """Share of the expected strings that the answer holds as whole words, whatever their case."""
    return sum(bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE)) for word in expected) / len(
        expected
    )


def _ask(subject: Subject, context: Context, rest: Int[Tensor, "1 t"]) -> Context:
    """The context when the rest of the prompt has been read too, in one pass as a further turn would."""
    if not rest.shape[-1]:
        return context
    with torch.inference_mode():
        output = subject.model(input_ids=rest, past_key_values=context.cache, logits_to_keep=1)
    return replace(context, logits=output.logits[:, -1].float())
