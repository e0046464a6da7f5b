"""Run folder: a folder -> what a run is and what it has finished, kept on disk from the moment it is known.

`run.json` says what the run is: configuration, inputs, versions, machine. `units.jsonl` takes a line for every item
under every policy. `results.json` holds both and the summary, and is all that tables need.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from headwise.errors import ConfigurationError, InputError, MismatchError
from headwise.eval.task import Measured
from headwise.files import write_text

RUN, UNITS, RESULTS = "run.json", "units.jsonl", "results.json"

# What must be the same for a run to be continued; versions and machine may have changed, and are kept as they were.
_FIXED = ("configuration", "model", "inputs")


@dataclass(frozen=True)
class Unit:
    """One item under one policy, measured.

    Attributes:
        task, item, policy: label, key and label.
        digest: of the item's data.
    """

    task: str
    item: str
    policy: str
    digest: str
    measured: Measured

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is the measurement of."""
        return self.task, self.item, self.policy

    def to_dict(self) -> dict[str, Any]:
        """Plain values, what was measured among them."""
        head = {"task": self.task, "item": self.item, "policy": self.policy, "digest": self.digest}
        return head | asdict(self.measured)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Unit:
        """As `to_dict` made it."""
        rest = dict(values)
        head = {name: rest.pop(name) for name in ("task", "item", "policy", "digest")}
        return cls(**head, measured=Measured(**rest))


class RunFolder:
    """The folder of a run; made where it is missing.

    Args:
        resume: whether to continue the run that it may hold.

    Raises:
        ConfigurationError: when it holds a run that is not to be continued.
        InputError: when it cannot be made.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder = folder
        self._there = (folder / RUN).exists()
        if self._there and not resume:
            raise ConfigurationError(f"{str(folder)!r} holds a run; continue it with --resume, or take another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}") from error

    def begin(self, header: dict[str, Any]) -> tuple[dict[str, Any], list[Unit]]:
        """Write down what the run is, or make sure that it is the one to continue.

        Returns:
            what the run is, as first written down, and the units that it has finished.

        Raises:
            MismatchError: when the folder holds another run.
            InputError: when its files are broken.
        """
        if not self._there:
            write_json(self.folder / RUN, header)
            return header, []
        known = _read_header(self.folder / RUN)
        # As JSON has it: tuples are lists there.
        given = json.loads(json.dumps(header))
        different = [name for name in _FIXED if known.get(name) != given[name]]
        if different:
            raise MismatchError(
                f"the run in {str(self.folder)!r} cannot be continued: {' and '.join(different)} differ from what was "
                "given; repeat its options, or take another folder"
            )
        return known, _read_units(self.folder / UNITS)

    @contextmanager
    def writer(self) -> Iterator[TextIO]:
        """Where finished units go."""
        with open(self.folder / UNITS, "a", encoding="utf-8") as file:
            yield file

    def finish(self, results: dict[str, Any]) -> None:
        """Write everything that tables need; replaces what was there."""
        write_json(self.folder / RESULTS, results)


def write_unit(file: TextIO, unit: Unit) -> None:
    """One line, on its way to the disk at once."""
    file.write(json.dumps(unit.to_dict(), allow_nan=False) + "\n")
    file.flush()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As `write_text` does.

    Raises:
        InputError: when the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(path)!r} does not describe a run: {error}") from error
    return header


def _read_units(path: Path) -> list[Unit]:
    """The units in the file; a line without an end was broken off, and is removed."""
    if not path.exists():
        return []
    units, whole = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                units.append(Unit.from_dict(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"line {number} of {str(path)!r} is not the record of a unit: {error}") from error
            whole += len(line)
    os.truncate(path, whole)
    return units
