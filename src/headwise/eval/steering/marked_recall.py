"""Marked recall: real text with facts in it, one of which is marked -> whether it is told when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.eval.cache_kinds import CacheKind
from headwise.eval.question import Question, encode_question
from headwise.eval.recall import Recall
from headwise.eval.steering.treatments import Treatment
from headwise.eval.task import Context, Item, Measured, Subject
from headwise.hosts.transformers.marked import encode_marked
from headwise.steer.spans import Marked


@dataclass(frozen=True)
class MarkedRecall(Recall):
    """As `Recall`; what is asked for is marked in the text."""

    name: ClassVar[str] = "marked recall"

    def measure(self, subject: Subject, item: Item, kind: CacheKind, reference: None) -> Measured:
        """Write the text as the way has it, and ask."""
        assert isinstance(kind, Treatment)
        if kind.examples:
            raise ConfigurationError(f"{self.name} has no examples; leave that way out")
        told = Question(**{name: item.data[name] for name in ("document", "question", "cue", "expected", "details")})
        at = told.document.index(item.data["fact"])
        document = kind.written(told.document, [(at, at + len(item.data["fact"]))])
        asked = Question(document, told.question, told.cue, told.expected, told.details)
        ids, context = encode_question(subject.tokenizer, asked)
        whole = {"ids": ids, "context": len(ids) if self.query == "aware" else context}
        marked = self._marked(subject.tokenizer, asked, item.data["fact"], ids)
        return super().measure(subject, Item(item.key, {**item.data, **whole, "marked": marked}), kind, None)

    def read(self, subject: Subject, item: Item, kind: CacheKind, ids: torch.Tensor) -> Context:
        """Say what is marked first."""
        assert isinstance(kind, Treatment)
        cache = kind.make(subject.model, subject.tokenizer, ids.shape[-1], subject.options)
        kind.mark(cache, item.data["marked"])
        return subject.read_into(cache, ids, kind)

    def _data(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> dict[str, Any]:
        return {
            "document": question.document,
            "question": question.question,
            "cue": question.cue,
            "expected": list(question.expected),
            "details": question.details,
            "fact": f"{question.cue} {question.expected[0]}.",
            "limit": self.limit(tokenizer, question),
        }

    def _marked(self, tokenizer: PreTrainedTokenizerBase, asked: Question, fact: str, ids: list[int]) -> Marked:
        if tokenizer.chat_template is None:
            text: Any = f"{asked.document}\n\nQuestion: {asked.question}\nAnswer: {asked.cue}"
        else:
            text = [{"role": "user", "content": f"{asked.document}\n\n{asked.question}"}]
        inputs, marked = encode_marked(tokenizer, text, [fact])
        assert inputs["input_ids"][0].tolist() == ids
        return marked
