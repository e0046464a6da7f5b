"""Obeyed: an instruction that a program can check and a text that a model wrote -> whether the text does as it says.

The checks of the published programs can be passed by texts that do nothing: an empty text has no pronoun in it, and
"{}" is JSON. So an answer must also say what was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from headwise.eval.question import found
from headwise.eval.rouge import rouge_l
from headwise.measure.instructions import Instruction

_FENCE = re.compile(r"\A```(?:json)?\n(?P<inside>.*)\n```\Z", re.DOTALL)
_SUBJECTS = {"she", "he"}
_PRONOUNS = {*_SUBJECTS, "her", "hers", "herself", "his", "him", "himself"}
# What of a text has to be there again when it was rewritten, by ROUGE-L.
_KEPT = 0.5
_LEAST_WORDS = 5


def obeyed(instruction: Instruction, answer: str) -> dict[str, float]:
    """1 or 0 each: `obeyed`, and what else is told of such an instruction.

    `json`: the whole answer is an object with both fields (a fence around it is no matter); `within`: one is somewhere
    in the answer; `prediction`: the first such has the right occupation.
    `pronouns`: neither she nor he is in the answer, but they is, and the rest of the text; `all_changed`: nor is any
    other of their forms.
    Rules: the answer does as the rule says, has five words and names the thing it was asked about, and does not repeat
    the instruction.
    """
    answer = answer.strip()
    if instruction.rule == "json":
        return _json(instruction.details, answer)
    if instruction.rule == "pronouns":
        return _pronouns(instruction.details, answer)
    told = found([instruction.details["thing"]], answer) and instruction.span not in answer
    enough = len(answer.split()) >= _LEAST_WORDS
    return {"obeyed": float(bool(told and enough and _RULES[instruction.rule](answer, instruction.details["detail"])))}


def _json(details: Mapping[str, str], answer: str) -> dict[str, float]:
    fence = _FENCE.match(answer)
    try:
        whole = json.loads(fence["inside"] if fence else answer)
    except (ValueError, RecursionError):
        whole = None
    within = next((each for each in _objects(answer) if _filled(each)), None)
    right = within is not None and found([details["occupation"]], within["occupation"])
    return {"obeyed": float(_filled(whole)), "within": float(within is not None), "prediction": float(right)}


def _objects(text: str) -> list[Any]:
    """Everything in a text that is JSON from a brace on."""
    decoder, read = json.JSONDecoder(), []
    for brace in re.finditer("{", text):
        try:
            read.append(decoder.raw_decode(text, brace.start())[0])
        except (ValueError, RecursionError):
            continue
    return read


def _filled(value: Any) -> bool:
    """Whether it is an object with both fields, and something in them."""
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) and value[name].strip() for name in ("name", "occupation")
    )


def _pronouns(details: Mapping[str, str], answer: str) -> dict[str, float]:
    words = set(re.findall(r"[a-z]+", answer.lower()))
    kept = "they" in words and rouge_l(answer, details["changed"]) >= _KEPT
    return {"obeyed": float(kept and not words & _SUBJECTS), "all_changed": float(kept and not words & _PRONOUNS)}


def _is_list(answer: str, _: str) -> bool:
    lines = [line for line in answer.splitlines() if line.strip()]
    return len(lines) == 2 and all(line.startswith("* ") for line in lines)


def _has_title(answer: str, _: str) -> bool:
    title = re.match(r"<<(?P<title>[^<>]+)>>\s*\w", answer)
    return title is not None and title["title"].strip().lower() != "this"


def _ends(answer: str, detail: str) -> bool:
    return re.sub(r"\W+\Z", "", answer).lower().endswith(detail.lower())


_RULES: dict[str, Callable[[str, str], bool]] = {
    "capitals": lambda answer, _: answer.isupper(),
    "lowercase": lambda answer, _: answer.islower(),
    "no commas": lambda answer, _: "," not in answer,
    "list": _is_list,
    "quotes": lambda answer, _: re.fullmatch(r'"[^"]+"', answer) is not None,
    "title": _has_title,
    "opening": lambda answer, detail: answer.lower().startswith(detail.lower()),
    "ending": _ends,
    "word": lambda answer, detail: bool(found([detail], answer)),
}
