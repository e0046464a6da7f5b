"""Answers: a generated text and what the file says about its prompt -> whether it is right, and by which measure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from headwise.errors import InputError
from headwise.eval.programs import Limits, runs
from headwise.eval.rouge import rouge_l

# What GSM8K puts before the final number (Cobbe et al. 2021).
_FINAL = "####"

# A sign counts unless it stands between two operands, as in 16-3.
_NUMBER = re.compile(r"(?P<sign>(?<![\w).])[-−])?[$€£]?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<rest>\.\d+)?")

# Code in a Markdown fence; the closing one may be missing where the text was cut off.
_FENCED = re.compile(r"```[^\n`]*\n(?P<code>.*?)(?:```|\Z)", re.DOTALL)

# The first line that is not indented ends the body of a function.
_END_OF_BODY = re.compile(r"\n(?=\S)")


@dataclass(frozen=True)
class Measure:
    """A way to judge answers.

    Attributes:
        metric: its name in records and tables.
        fields: of the data of an item that it needs.
        score: from an item's data and the generated text, from 0 to 1.
    """

    metric: str
    fields: tuple[str, ...]
    score: Callable[[dict[str, Any], str], float]


def final_number(text: str) -> Decimal | None:
    """The number a worked answer arrives at: the first one behind the last "####", or else the last one in the text.

    Commas between groups of three digits, currency signs and zeros behind the point do not matter.
    """
    _, marker, tail = text.rpartition(_FINAL)
    numbers = [match for match in _NUMBER.finditer(tail) if match["digits"] or match["rest"]]
    if not numbers:
        return None
    found = numbers[0] if marker else numbers[-1]
    value = Decimal((found["digits"] or "0").replace(",", "") + (found["rest"] or ""))
    return -value if found["sign"] else value


def program(prompt: str, answer: str, entry_point: str, test: str) -> str:
    """The program that tests a function: the prompt, the body the model wrote, and the file's own test.

    What follows the body is left out (HumanEval: Chen et al. 2021, section 3.1). Where the answer has the whole
    function in a Markdown fence, that replaces the prompt's beginning of it.
    """
    head = f"def {entry_point}("
    whole = [found["code"] for found in _FENCED.finditer(answer) if head in found["code"]]
    function = prompt.rpartition(head)[0] + whole[-1] if whole else prompt + _END_OF_BODY.split(answer, maxsplit=1)[0]
    return f"{function}\n\n{test}\n\ncheck({entry_point})\n"


def _number_matches(data: dict[str, Any], text: str) -> float:
    expected = final_number(data["answer"])
    return float(expected is not None and final_number(text) == expected)


def _rouge_to_reference(data: dict[str, Any], text: str) -> float:
    return rouge_l(text, data["answer"])


def _passes(data: dict[str, Any], text: str) -> float:
    source = program(data["prompt"], text, data["entry_point"], data["test"])
    return float(runs(source, Limits()))


MEASURES = {
    "number": Measure("answer", ("answer",), _number_matches),
    "rouge": Measure("reference_rouge_l", ("answer",), _rouge_to_reference),
    "code": Measure("pass_at_1", ("prompt", "test", "entry_point"), _passes),
}


def check_answer(name: str, data: dict[str, Any], where: str) -> None:
    """Refuse an answer of the file that is not right by its own measure, and so could never be given.

    Raises:
        InputError: saying where it is.
    """
    measure = MEASURES[name]
    if "answer" in measure.fields and not measure.score(data, data["answer"]):
        raise InputError(f"{where}: metric {name!r} finds nothing to compare with in {data['answer'][:80]!r}")
