"""Results: a folder with records of runs -> a document of their tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwise.cli import options
from headwise.cli.tables import message
from headwise.errors import ConfigurationError

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the records are.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="Write here, not to standard output.", rich_help_panel=options.OUTPUT
    ),
]
Add = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR",
        help="First copy the run in that folder to the records, without its texts and maps; may be repeated.",
        rich_help_panel=options.INPUT,
    ),
]


def results(folder: Folder, out: Out = None, add: Add = None) -> None:
    """Write the tables of all recorded runs as Markdown."""
    from headwise.eval.compare.published import publish, render_records
    from headwise.files import write_text

    for word in add or []:
        name, equals, run = word.partition("=")
        if not (equals and name and run) or Path(name).name != name:
            raise ConfigurationError(f"--add takes NAME=DIR, such as fidelity=runs/fidelity, got {word!r}")
        message(f"record: {publish(Path(run), name, folder)}\n")
    document = render_records(folder)
    if out is None:
        typer.echo(document, nl=False)
    else:
        write_text(out, document)
