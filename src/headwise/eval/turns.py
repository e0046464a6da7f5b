"""Turns: real text with something told in every turn -> whether it is still known when it is asked for in the last.

Each turn is one pass over what the user says and a word of answer, as in a chat; a policy chooses again in between.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.eval.cache_kinds import CacheKind
from headwise.eval.greedy import common_prefix, continue_greedily
from headwise.eval.question import found
from headwise.eval.recall import PLACES
from headwise.eval.task import Item, Measured, Subject, Task
from headwise.measure.texts import plant, read_documents, take_passages
from headwise.policies.checks import check_choice, check_count

# What the assistant says to everything that it is told.
_HEARD = "I see."


@dataclass(frozen=True)
class Turns(Task):
    """Facts told in the turns of a chat among other talk, and a question in one turn more.

    Metrics: `recall`, whether the greedy answer holds what is asked for; `held`, bytes of the rows kept before the
    question, as a share of a full cache of the model's dtype.

    Args:
        kind: `facts`: every turn tells another, and one of them is asked for; `tally`: every turn tells a new count of
            the same thing, and the last one is asked for.
        context: tokens of all that is told, about.
        turns: in which something is told.
        count: chats.
        new_tokens: length of the answer at the most.
        seed: of everything that is drawn.
        files: UTF-8 texts; Python's manual where there are none.
        undo_marks: write WikiText's `@-@`, `@,@` and `@.@` as the signs they stand for, and `<unk>` as a word.

    Raises:
        ConfigurationError: for a count below 1, or another kind.
    """

    kind: str = "facts"
    context: int = 6000
    turns: int = 8
    count: int = 16
    new_tokens: int = 24
    seed: int = 0
    files: tuple[Path, ...] = ()
    undo_marks: bool = False

    name: ClassVar[str] = "turns"
    primary: ClassVar[str] = "recall"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("facts", "tally"))
        for name in ("context", "turns", "count", "new_tokens"):
            check_count(name, getattr(self, name), 1)
        if self.turns > len(PLACES):
            raise ConfigurationError(f"turns must be a count from 1 to {len(PLACES)}, got {self.turns}")

    @property
    def title(self) -> str:
        """With the kind and the number of turns."""
        return f"{self.name}: {self.kind} of {self.turns}"

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """One chat for every question.

        Raises:
            InputError: when a file cannot be read or is too short.
        """
        return [Item(f"{number:05d}", data) for number, data in enumerate(self._chats(tokenizer))]

    def measure(self, subject: Subject, item: Item, kind: CacheKind, reference: None) -> Measured:
        """Read turn after turn, and answer the last."""
        ids, ends = torch.tensor([item.data["ids"]], device=subject.model.device), item.data["ends"]
        subject.check_room(ids.shape[-1] + self.new_tokens)
        context = subject.read(ids[:, : ends[0]], kind)
        for start, end in zip(ends, [*ends[1:], ids.shape[1]], strict=True):
            if end == ids.shape[1]:
                context.report = kind.report(subject.model, context.cache, start)
            with torch.inference_mode():
                output = subject.model(input_ids=ids[:, start:end], past_key_values=context.cache, logits_to_keep=1)
        asked = replace(context, logits=output.logits[:, -1].float())
        new = continue_greedily(subject, asked, self.new_tokens)
        answer = str(subject.tokenizer.decode(new, skip_special_tokens=True))
        held = context.report.used_bytes / context.report.full_bytes
        metrics = {"recall": found(item.data["expected"], answer), "held": held}
        return context.measured(metrics, answer=answer, expected=item.data["expected"], **item.data["details"])

    def _chats(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
        documents = read_documents(self.files, self.undo_marks)
        per_document = -(-self.count // len(documents))
        length = -(-self.context // self.turns)
        passages = take_passages(tokenizer, documents, length * self.turns, per_document)
        for number, passage in enumerate(passages[: self.count]):
            rng = random.Random(f"turns {self.kind} {self.seed} {number}")
            told, question, cue, expected, asked = self._told(rng)
            parts = [passage.ids[start : start + length] for start in range(0, length * self.turns, length)]
            texts = [plant(tokenizer.decode(part), [t], rng)[0] for part, t in zip(parts, told, strict=True)]
            ids, ends = encode_chat(tokenizer, [*texts, question], cue)
            details = {"document": passage.document, "start": passage.start, "turn": asked}
            yield {"ids": ids, "ends": ends, "expected": [expected], "details": details}

    def _told(self, rng: random.Random) -> tuple[list[str], str, str, str, int]:
        """What is told in every turn, the question, how its answer begins, what it must hold, and the turn of that."""
        numbers = [str(secret) for secret in rng.sample(range(10_000, 100_000), self.turns)]
        if self.kind == "tally":
            (place,) = rng.sample(PLACES, 1)
            told = [f"The visitors of the {place} are now {n} in all." for n in numbers]
            question = f"How many visitors of the {place} are there now in all? Answer with the number."
            return told, question, f"The visitors of the {place} are now", numbers[-1], self.turns - 1
        places, asked = rng.sample(PLACES, self.turns), rng.randrange(self.turns)
        told = [f"The secret number of the {p} is {n}." for p, n in zip(places, numbers, strict=True)]
        question = f"What is the secret number of the {places[asked]}? Answer with the number."
        return told, question, f"The secret number of the {places[asked]} is", numbers[asked], asked


def encode_chat(tokenizer: PreTrainedTokenizerBase, said: Sequence[str], cue: str) -> tuple[list[int], list[int]]:
    """Token ids of a chat in which somebody says all that, in the chat template where there is one.

    Args:
        cue: how the last answer begins; given to models that have no chat template.

    Returns:
        the ids, and where every turn but the last ends.
    """
    if tokenizer.chat_template is None:
        talk = [f"{text}\n\n{_HEARD}\n\n" for text in said[:-1]]
        texts = ["".join(talk[: end + 1]) for end in range(len(talk))]
        texts.append(f"{''.join(talk)}Question: {said[-1]}\nAnswer: {cue}")
    else:
        messages: list[dict[str, str]] = []
        texts = []
        for text in said[:-1]:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": _HEARD}]
            texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
        messages.append({"role": "user", "content": said[-1]})
        texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)))
    # A chat template writes the first token itself.
    options = {"add_special_tokens": tokenizer.chat_template is None, "verbose": False}
    *parts, whole = (list(tokenizer(text, **options)["input_ids"]) for text in texts)
    return whole, [common_prefix(part, whole) for part in parts]
