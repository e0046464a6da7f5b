"""Generation: a file of prompts -> what a compressed cache writes instead of the full one, and whether it is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError, InputError
from headwise.eval.answers import MEASURES, check_answer
from headwise.eval.cache_kinds import FULL_CACHE, CacheKind
from headwise.eval.greedy import common_prefix, continue_greedily
from headwise.eval.layouts import Layout, find_layout
from headwise.eval.programs import Limits, check_can_run
from headwise.eval.prompt_file import read_records
from headwise.eval.rouge import rouge_l
from headwise.eval.task import Context, Item, Measured, Query, Subject, Task
from headwise.files import read_text
from headwise.policies.checks import check_choice, check_count

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Generation(Task):
    """Prompts of a file, answered greedily with the full cache and with a compressed one.

    The whole prompt is compressed, its question included. The first new token comes from the pass that reads the
    prompt, which attends to all of it; the others are written on the compressed cache.

    Metrics: `exact_match` of all new tokens, `first_difference` (how many agree before the first that does not),
    `rouge_l` between the two texts; and where the file has an answer `answer` (the final number is right),
    `reference_rouge_l` (ROUGE-L to the file's answer) or `pass_at_1` (the program passes the file's test).

    Args:
        file: JSON objects, one per line or in one list; may be compressed by gzip. GSM8K's, HumanEval's and
            AlpacaEval's own files are recognised.
        prompt_field, answer_field: of other files.
        prefix: a file whose text comes before every prompt, such as worked examples.
        template: "chat" puts prompts into the tokenizer's chat template, "raw" leaves them as they are; "auto" does
            what suits the file and the tokenizer.
        metric: "number", "rouge" or "code" judges the answers; "auto" does what suits the file, "none" nothing.
        run_code: allow "code", which runs what the model wrote, on this machine: see `programs.runs` for the
            limits. Without it "auto" does not judge programs.
        limit: prompts at most, from the beginning of the file.
        max_prompt_tokens: leave out longer prompts, with everything that comes before them.
        max_new_tokens: of every answer.

    Raises:
        ConfigurationError: for a value out of range, or a metric that is not allowed or cannot run here.
    """

    file: Path
    prompt_field: str | None = None
    answer_field: str | None = None
    prefix: Path | None = None
    template: str = AUTO
    metric: str = AUTO
    run_code: bool = False
    limit: int | None = None
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 128
    query: Query = field(default="aware", init=False)

    name: ClassVar[str] = "generation"
    primary: ClassVar[str] = "rouge_l"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("limit", "max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        check_choice("template", self.template, ("auto", "chat", "raw"))
        check_choice("metric", self.metric, (AUTO, NONE, *MEASURES))
        if self.metric == "code" and not self.run_code:
            raise ConfigurationError("metric 'code' runs what the model wrote: allow it with run_code")
        if self.run_code:
            check_can_run(Limits())

    @property
    def title(self) -> str:
        """With the name of the file."""
        return f"{self.name} of {self.file.name}"

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """The prompts as token ids, and what their answers are judged by."""
        records = read_records(self.file)
        layout = find_layout(records[0], self.prompt_field, self.answer_field)
        measure = self._choose_measure(layout)
        prefix = "" if self.prefix is None else f"{read_text(self.prefix).strip()}\n\n"
        chat = self._choose_template(layout, tokenizer)
        items: list[Item] = []
        for number, record in enumerate(records, start=1):
            if len(items) == self.limit:
                break
            where = f"record {number} of {self.file.name}"
            picked = _pick(record, layout, measure, where)
            ids = _encode(tokenizer, prefix + picked["prompt"], chat)
            if self.max_prompt_tokens is None or len(ids) <= self.max_prompt_tokens:
                items.append(Item(where, {"ids": ids, "measure": measure, **picked}))
        if not items:
            raise InputError(f"every prompt of {str(self.file)!r} is longer than {self.max_prompt_tokens} tokens")
        return items

    def reference(self, subject: Subject, item: Item) -> list[int]:
        """The tokens that the full cache writes.

        Raises:
            InputError: when the model has no room for the prompt and the new tokens.
        """
        subject.check_room(len(item.data["ids"]) + self.max_new_tokens)
        return self._write(subject, item, FULL_CACHE)[1]

    def measure(self, subject: Subject, item: Item, kind: CacheKind, reference: list[int]) -> Measured:
        """What is written with that cache, against the full cache and the file's answer."""
        context, new = self._write(subject, item, kind)
        text, expected = (_decode(subject.tokenizer, item.data["ids"], ids) for ids in (new, reference))
        metrics = {
            "exact_match": float(new == reference),
            "first_difference": float(common_prefix(new, reference)),
            "rouge_l": rouge_l(text, expected),
        }
        if item.data["measure"] is not None:
            measure = MEASURES[item.data["measure"]]
            metrics[measure.metric] = measure.score(item.data, text)
        return context.measured(metrics, text=text, new_tokens=len(new))

    def _write(self, subject: Subject, item: Item, kind: CacheKind) -> tuple[Context, list[int]]:
        context = subject.read(torch.tensor([item.data["ids"]]), kind)
        return context, continue_greedily(subject, context, self.max_new_tokens)

    def _choose_measure(self, layout: Layout) -> str | None:
        if self.metric != AUTO:
            return None if self.metric == NONE else self.metric
        return None if layout.measure == "code" and not self.run_code else layout.measure

    def _choose_template(self, layout: Layout, tokenizer: PreTrainedTokenizerBase) -> bool:
        if self.template == "chat" and tokenizer.chat_template is None:
            raise InputError("this tokenizer has no chat template; choose template 'raw'")
        return self.template == "chat" or (
            self.template == AUTO and layout.chat and tokenizer.chat_template is not None
        )


def _pick(record: dict[str, Any], layout: Layout, measure: str | None, where: str) -> dict[str, str]:
    """The prompt, and what the measure needs; all of it text."""
    sources = {"prompt": layout.prompt}
    if measure is not None:
        sources |= {name: name for name in MEASURES[measure].fields if name not in ("prompt", "answer")}
        if "answer" in MEASURES[measure].fields:
            if layout.answer is None:
                raise InputError(f"metric {measure!r} needs an answer: name its field as answer_field")
            sources["answer"] = layout.answer
    for source in sources.values():
        if not isinstance(record.get(source), str | int | float):
            raise InputError(f"{where}: field {source!r} must be text, got {record.get(source)!r:.60}")
    picked = {name: str(record[source]) for name, source in sources.items()}
    if measure is not None:
        check_answer(measure, picked, where)
    return picked


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(text)["input_ids"])
    message = [{"role": "user", "content": text}]
    encoded: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _decode(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """The text of the new tokens as it stands behind the prompt: alone, some tokenizers drop its first space."""
    before, everything = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, prompt + new))
    return everything[len(before) :]
