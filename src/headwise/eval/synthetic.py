"""Synthetic: nothing but a seed -> long prompts with one right answer, after the task definitions of RULER.

Six kinds of Hsieh et al. (RULER, 2024, section 3), written anew: words, sentences and wording are headwise's own, so
scores cannot be compared with published ones, only with each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.eval.haystack import made_words, noise, token_count, word_list, zipf_words
from headwise.eval.question import Question, QuestionTask
from headwise.measure.texts import plant
from headwise.policies.checks import check_choice, check_count

# RULER's numbers of words to find (section 3.3).
_COMMON, _FREQUENT = 10, 3


@dataclass(frozen=True)
class Synthetic(QuestionTask):
    """Questions about made-up text.

    Args:
        kind: `single-needle`: a code in noise. `multi-key`: the same among codes of other owners. `multi-value`: all
            codes of one owner. `variables`: all names that a value was handed on to. `common-words`: the ten words
            that occur ten times as often as the others. `frequent-words`: the three most frequent words of a Zipf
            distribution.
        new_tokens: of the answer, beyond those of what is expected.
        needles: codes, where there are several.
        hops: times that a variable is handed on.
    """

    kind: str = "single-needle"
    needles: int = 4
    hops: int = 4

    name: ClassVar[str] = "synthetic"
    through_server: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, tuple(KINDS))
        check_count("needles", self.needles, 1)
        check_count("hops", self.hops, 1)

    @property
    def title(self) -> str:
        """With the kind."""
        return f"{self.name} {self.kind}"

    def limit(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
        """Room for everything expected, and a few words around it."""
        return self.new_tokens + token_count(tokenizer, ", ".join(question.expected))

    def questions(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Question]:
        """Every one drawn anew."""
        for number in range(self.count):
            rng = random.Random(f"{self.kind} {self.seed} {number}")
            yield KINDS[self.kind](self, tokenizer, rng)


def _single_needle(task: Synthetic, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Question:
    return _needles(task, tokenizer, rng, owners=1, codes=1)


def _multi_key(task: Synthetic, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Question:
    return _needles(task, tokenizer, rng, owners=task.needles, codes=1)


def _multi_value(task: Synthetic, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Question:
    return _needles(task, tokenizer, rng, owners=1, codes=task.needles)


def _needles(
    task: Synthetic, tokenizer: PreTrainedTokenizerBase, rng: random.Random, owners: int, codes: int
) -> Question:
    """Codes of owners, one of whom is asked about (RULER, section 3.1)."""
    names = [word.title() for word in made_words(rng, owners)]
    secrets = [str(code) for code in rng.sample(range(100_000, 1_000_000), owners * codes)]
    pairs = [(names[index % owners], secret) for index, secret in enumerate(secrets)]
    sentences = [f"A code of {owner} is {secret}." for owner, secret in pairs]
    rng.shuffle(sentences)
    document, depths = plant(noise(tokenizer, rng, task.context), sentences, rng)
    asked = names[0]
    wanted = "What is the code" if codes == 1 else f"What are the {codes} codes"
    expected = [secret for owner, secret in pairs if owner == asked]
    found = [depth for depth, sentence in zip(depths, sentences, strict=True) if f" {asked} " in sentence]
    return Question(document, f"{wanted} of {asked}?", f"The codes of {asked}:", expected, {"depths": found})


def _variables(task: Synthetic, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Question:
    """A value that goes from name to name, in this order in the text (RULER, section 3.2)."""
    names = [word.upper() for word in made_words(rng, task.hops + 1)]
    value = str(rng.randrange(10_000, 100_000))
    sources = [value, *names]
    sentences = [f"Let {name} = {source}." for name, source in zip(names, sources, strict=False)]
    document, depths = plant(noise(tokenizer, rng, task.context), sentences, rng)
    question = f"Which {len(names)} variables have the value {value}? Some were set by way of others."
    return Question(document, question, f"The variables with the value {value}:", names, {"depths": depths})


def _common_words(task: Synthetic, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Question:
    """A list of words, some of which occur ten times as often as all others (RULER, section 3.3)."""
    document, common = word_list(tokenizer, rng, task.context, _COMMON)
    question = f"Which {_COMMON} words occur most often in this list?"
    return Question(document, question, "The words that occur most often:", common)


def _frequent_words(task: Synthetic, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Question:
    """Words as frequent as Zipf's law says (RULER, section 3.3)."""
    document, ranked = zipf_words(tokenizer, rng, task.context)
    if len(ranked) <= _FREQUENT:
        raise ConfigurationError(f"a context of {task.context} tokens is too short for frequent words; take more")
    question = f"Which {_FREQUENT} words occur most often in this text?"
    return Question(document, question, "The words that occur most often:", ranked[:_FREQUENT])


KINDS: dict[str, Callable[[Synthetic, PreTrainedTokenizerBase, random.Random], Question]] = {
    "single-needle": _single_needle,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "variables": _variables,
    "common-words": _common_words,
    "frequent-words": _frequent_words,
}
