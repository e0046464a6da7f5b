"""Published: a folder with records of runs -> one Markdown document with all of their tables."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwise.errors import InputError
from headwise.eval.compare.page import make_environment
from headwise.eval.run_folder import RESULTS, write_json
from headwise.eval.setting import describe_setting
from headwise.eval.tables import LEGEND, make_grids


def render_records(folder: Path) -> str:
    """The document, with a chapter per record in the order of their names.

    Raises:
        InputError: when there is no record, or one cannot be read.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"there are no records in {str(folder)!r}; publish a run there with --add NAME=DIR")
    records = {path.stem: _read(path) for path in paths}
    chapters = [
        {"name": name, "setting": describe_setting(record), "grids": make_grids(record["summaries"])}
        for name, record in records.items()
    ]
    environment = make_environment(autoescape=False)
    environment.filters["cell"] = _cell
    return environment.get_template("results.md.jinja").render(chapters=chapters, legend=LEGEND, folder=folder.name)


def publish(run: Path, name: str, folder: Path) -> Path:
    """Copy the results of a run to the folder of records, without the details of its units.

    What every item measured is kept, so that means and intervals can be computed again; the texts that were written
    and the maps of heads, which are most of the file, are left where they were made.

    Returns:
        the new file.

    Raises:
        InputError: when the run has no results, or they cannot be written.
    """
    results = dict(_read(run / RESULTS))
    results["units"] = [{n: value for n, value in unit.items() if n != "details"} for unit in results["units"]]
    target = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}") from error
    write_json(target, results)
    return target


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Whatever is not the record of a run lacks one of the two.
        describe_setting(record), record["summaries"]
    except OSError as error:
        raise InputError(f"cannot read the record {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is not the record of a run: {error}") from error
    return record


def _cell(text: str) -> str:
    """A word as a cell of a table takes it."""
    return html.escape(text, quote=False).replace("|", r"\|").replace("\n", "<br>")
