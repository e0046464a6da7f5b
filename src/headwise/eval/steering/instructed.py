"""Instructed: something to do with a marked instruction -> what the model writes, and whether that obeys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.eval.cache_kinds import CacheKind
from headwise.eval.greedy import continue_greedily
from headwise.eval.steering.fluency import fluency
from headwise.eval.steering.obeyed import obeyed
from headwise.eval.steering.treatments import Treatment
from headwise.eval.task import Item, Measured, Subject, Task
from headwise.hosts.transformers.marked import encode_marked
from headwise.measure.chat import write_prompt
from headwise.measure.instructions import INSTRUCTIONS, Instruction, made_instructions
from headwise.policies.checks import check_choice, check_count

# Examples before a prompt, where that is how the model is told, and of how many others they are chosen.
_EXAMPLES, _OTHERS = 3, 200
_NEW_TOKENS = {"json": 48, "pronouns": 80, "rules": 64}


@dataclass(frozen=True)
class Instructed(Task):
    """Prompts in the tokenizer's template, answered greedily.

    Metrics: `obeyed` and others of each kind, see `obeyed`; `fluency` in bits; `words` of the answer.

    Args:
        kind: json, pronouns or rules.
        count: prompts.
        seed: of the prompts. No name and no thing in them is in those that heads are profiled by.
        new_tokens: of an answer at the most; None for what suits the kind.
    """

    kind: str = "json"
    count: int = 100
    seed: int = 0
    new_tokens: int | None = None

    name: ClassVar[str] = "instructed"
    primary: ClassVar[str] = "obeyed"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, INSTRUCTIONS)
        check_count("count", self.count, 1)
        if self.new_tokens is not None:
            check_count("new_tokens", self.new_tokens, 1)

    @property
    def title(self) -> str:
        """With the kind."""
        return f"{self.name}: {self.kind}"

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """One for every instruction, with answered ones of the same rule as examples."""
        samples = made_instructions(self.kind, self.count, self.seed, measured=True)
        others = made_instructions(self.kind, _OTHERS, self.seed)
        found = []
        for number, each in enumerate(samples):
            alike = [other for other in others if other.rule == each.rule][:_EXAMPLES]
            shown = [(other.asked, other.obeying) for other in alike]
            found.append(Item(f"{number:05d}", {"instruction": each.to_dict(), "examples": shown}))
        return found

    def measure(self, subject: Subject, item: Item, kind: CacheKind, reference: None) -> Measured:
        """Read what is asked, told in that way, and write the answer."""
        assert isinstance(kind, Treatment)
        told = Instruction(**item.data["instruction"])
        at = told.asked.rindex(told.span)
        asked = kind.written(told.asked, [(at, at + len(told.span))])
        prompt = write_prompt(subject.tokenizer, asked, item.data["examples"] if kind.examples else ())
        # Where signs are written, nothing is marked beside.
        marks = prompt.ranges(asked, [told.span]) if asked == told.asked else []
        inputs, marked = encode_marked(subject.tokenizer, prompt.text, marks, add_special_tokens=prompt.special)
        ids, limit = inputs["input_ids"], self.new_tokens or _NEW_TOKENS[self.kind]
        subject.check_room(ids.shape[1] + limit)
        cache = kind.make(subject.model, subject.tokenizer, ids.shape[1], subject.options)
        kind.mark(cache, marked)
        context = subject.read_into(cache, ids, kind)
        new = continue_greedily(subject, context, limit)
        answer = str(subject.tokenizer.decode(new, skip_special_tokens=True))
        metrics = {**obeyed(told, answer), "fluency": fluency(answer), "words": float(len(answer.split()))}
        return context.measured(metrics, answer=answer, rule=told.rule)
