"""Chat: what a user asks and examples that are answered -> one text, as the template of a tokenizer writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A text up to where the answer begins.

    Attributes:
        at: where in it that begins which is asked, in characters.
        special: whether it lacks the tokens that a tokenizer puts in front; a template writes them itself.
    """

    text: str
    at: int = 0
    special: bool = True

    def ranges(self, asked: str, spans: Sequence[str]) -> list[tuple[int, int]]:
        """Characters of the last place of each span in what is asked."""
        starts = [self.at + asked.rindex(span) for span in spans]
        return [(start, start + len(span)) for start, span in zip(starts, spans, strict=True)]


def write_prompt(tokenizer: PreTrainedTokenizerBase, asked: str, examples: Sequence[tuple[str, str]] = ()) -> Prompt:
    """In the tokenizer's template; lines of text where it has none.

    Args:
        examples: what was asked before, and answered.
    """
    special = tokenizer.chat_template is None
    if special:
        before = "".join(f"{each}\nAnswer: {answer}\n\n" for each, answer in examples)
        return Prompt(f"{before}{asked}\nAnswer:", len(before))
    turns = [(("user", each), ("assistant", answer)) for each, answer in examples]
    said = [*(turn for both in turns for turn in both), ("user", asked)]
    messages = [{"role": role, "content": content} for role, content in said]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    # Some templates leave out space around what is said.
    at = text.rindex(asked.strip()) - (len(asked) - len(asked.lstrip()))
    return Prompt(text, at, special)


def write_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """An answer as it follows such a prompt."""
    return f" {answer}" if tokenizer.chat_template is None else answer
