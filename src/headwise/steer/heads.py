"""Heads: a file or a mapping -> the query heads of every layer that are steered; and back into a file.

The format is the one that PASTA's authors published: a JSON object `{layer: [query heads]}`, or a list of layers, of
which all heads are meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwise.errors import ConfigurationError, InputError
from headwise.files import whole_file

# Query heads by layer; None for all of a layer.
Heads = dict[int, tuple[int, ...] | None]


def read_heads(given: Any) -> Heads:
    """Heads as somebody gave them, or as a file has them.

    Raises:
        InputError: when there is no such file, or it is none of heads.
        ConfigurationError: when what was given names no heads.
    """
    if isinstance(given, str | Path):
        path = Path(given)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{str(path)!r} is no file of heads: {error}") from error
        try:
            return read_heads(found)
        except ConfigurationError as error:
            raise InputError(f"{str(path)!r} is no file of heads: {error}") from error
    if isinstance(given, Mapping):
        heads = {_number(layer): _numbers(of) for layer, of in given.items()}
    elif isinstance(given, Sequence):
        heads = {_number(layer): None for layer in given}
    else:
        raise _refused(given)
    if not heads or any(of is not None and not of for of in heads.values()):
        raise ConfigurationError("there must be a head to steer in every layer that is named, and a layer")
    return dict(sorted(heads.items()))


def made_for(path: Path) -> tuple[str, tuple[int, int]] | None:
    """Name of the model that a file of heads was made for, its layers up to the last with heads, and heads of each.

    None where there are no scores beside the file.

    Raises:
        InputError: when what lies there are none.
    """
    scores = scores_file(path)
    if not scores.is_file():
        return None
    try:
        found = json.loads(scores.read_text(encoding="utf-8"))
        layers, heads = found["shape"]
        return str(found["model_name"]), (int(layers), int(heads))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{str(scores)!r} holds no scores of heads: {error}") from error


def scores_file(path: Path) -> Path:
    """Where the scores of a file of heads lie."""
    return path.with_name(f"{path.name.removesuffix('.json')}.scores.json")


def shipped_heads() -> Path:
    """The heads that come with headwise, of its default model."""
    return Path(__file__).parent / "profiled" / "heads.json"


def write_heads(heads: Mapping[int, Sequence[int]], path: Path) -> None:
    """Write heads as `read_heads` takes them.

    Raises:
        FileWriteError: when the file cannot be written; what was there before is still there.
    """
    with whole_file(path, "a file of heads") as scratch:
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {str(layer): sorted(of) for layer, of in sorted(heads.items())}
        scratch.write_text(json.dumps(named) + "\n", encoding="utf-8")


def _numbers(given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise _refused(given)
    return tuple(sorted({_number(head) for head in given}))


def _number(given: Any) -> int:
    # Keys of a JSON object are text.
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise _refused(given)
    return given


def _refused(given: Any) -> ConfigurationError:
    return ConfigurationError(
        f"heads are given as {{layer: [query heads]}}, as a list of layers, or as a file of either, got {given!r}"
    )
