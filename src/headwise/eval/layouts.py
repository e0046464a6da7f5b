"""Layouts: a record of a prompt file -> which of its fields is the prompt, which the answer, and how to judge it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from headwise.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Where a file keeps what.

    Attributes:
        fields: that a record must have to be recognised.
        prompt, answer: names of fields; no answer means that there is nothing to judge by.
        measure: one of `answers.MEASURES`.
        chat: whether the prompt is a user's message; otherwise it is text to be continued.
        marker: what the answer must hold to be recognised.
    """

    fields: tuple[str, ...]
    prompt: str
    answer: str | None = None
    measure: str | None = None
    chat: bool = True
    marker: str = ""

    def fits(self, record: dict[str, Any]) -> bool:
        """Whether the record has this layout."""
        answer = "" if self.answer is None else str(record.get(self.answer))
        return all(field in record for field in self.fields) and self.marker in answer


GSM8K = Layout(("question", "answer"), "question", "answer", "number", marker="####")
HUMAN_EVAL = Layout(("prompt", "test", "entry_point"), "prompt", None, "code", chat=False)
ALPACA_EVAL = Layout(("instruction", "output"), "instruction", "output", "rouge")

_KNOWN = (GSM8K, HUMAN_EVAL, ALPACA_EVAL, Layout(("prompt",), "prompt"))


def find_layout(record: dict[str, Any], prompt: str | None, answer: str | None) -> Layout:
    """The layout of that record; `prompt` and `answer` name its fields where it is none of the known ones.

    Raises:
        InputError: when it is not known, or has no such fields.
    """
    for field in (prompt, answer):
        if field is not None and field not in record:
            raise InputError(f"there is no field {field!r} in the file; it has: {', '.join(record)}")
    known = next((layout for layout in _KNOWN if layout.fits(record)), None)
    if prompt is not None and (known is None or known.prompt != prompt):
        known = Layout((prompt,), prompt)
    if known is None:
        raise InputError(f"which field is the prompt? The file has: {', '.join(record)}; name one as prompt_field")
    if answer is None or answer == known.answer:
        return known
    return replace(known, answer=answer, measure="rouge")
