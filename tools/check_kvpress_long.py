"""Check kvpress's DecodingPress: passages -> how far it moves late predictions, beside headwise at the same rows.

    PYTHONPATH=src python tools/check_kvpress_long.py --kvpress ../kvpress-env/bin/python --text wikitext.txt

Both read a prompt whole, and are fed the rest token by token; whenever `interval` of them have come, rows are dropped
until `target` are left in each head. In fp32 on the CPU, against the same predictions of the full cache: what
`headwise eval long` measures.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from check_kvpress import PAIRS, ask_kvpress
from safetensors.torch import load_file

from headwise.cli.loading import load
from headwise.cli.tables import message, output, plain_table
from headwise.errors import ConfigurationError, HeadwiseError
from headwise.eval.cache_kinds import PolicyCache
from headwise.eval.fidelity import compare
from headwise.eval.long import Long
from headwise.eval.task import Item, Subject
from headwise.hosts.transformers.models import find_default_model
from headwise.measure.machine import describe_machine, describe_versions
from headwise.policies.scored import Rechoosing


def measure(
    task: Long, subject: Subject, item: Item, names: list[str], sizes: dict[str, int], ask: dict[str, Any], python: str
) -> list[dict[str, Any]]:
    """One row for every pair, of one passage."""
    ids, reference, rows = task.ids(subject, item), task.reference(subject, item), []
    with tempfile.TemporaryDirectory() as folder:
        runs = [{"name": name, "presses": PAIRS[name].presses, **sizes} for name in names]
        passage = {"ids": ids[:, : task.context].tolist(), "following": ids[:, task.context : -1].tolist()}
        ask_kvpress(python, {**ask, **passage, "last": task.last, "folder": folder, "runs": runs})
        for name in names:
            message(f"headwise: {name}\n")
            found = load_file(Path(folder) / f"{name}.safetensors")
            theirs, _ = compare(reference, found["predictions"], ids[0, -task.last :])
            policy = PAIRS[name].policy.with_keep(sizes["target"])
            assert isinstance(policy, Rechoosing)
            ours = task.measure(subject, item, PolicyCache(replace(policy, choose_every=sizes["interval"])), reference)
            place = {"document": item.data["document"], "start": item.data["start"]}
            held = {"rows there": float(found["rows"].float().mean()), "held here": ours.metrics["held"]}
            rows.append({"policy": name, **sizes, **place, "theirs": theirs["kl"], "ours": ours.metrics["kl"], **held})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = plain_table("policy", "rows", "document", "start", "KL there", "here", "rows there", "held here")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['target']:,}",
            row["document"],
            f"{row['start']:,}",
            f"{row['theirs']:.4f}",
            f"{row['ours']:.4f}",
            f"{row['rows there']:,.0f}",
            f"{row['held here']:.1%}",
        )
    output().print(table)


def check(
    kvpress: Annotated[str, typer.Option(metavar="PYTHON", help="A Python that has kvpress.")],
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Instead of Python's manual.")] = None,
    undo_marks: Annotated[bool, typer.Option(help="Write WikiText's marks as the signs they stand for.")] = False,
    first_token: Annotated[int | None, typer.Option(metavar="ID", help="To put before every passage.")] = None,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")] = 1000,
    steps: Annotated[int, typer.Option(metavar="N", help="Tokens that are fed.")] = 2000,
    last: Annotated[int, typer.Option(metavar="N", help="Predictions that count, of the last.")] = 1000,
    passages: Annotated[int, typer.Option(metavar="N", help="Of every file.")] = 1,
    target: Annotated[int, typer.Option(metavar="N", help="Rows of a head.")] = 750,
    interval: Annotated[int, typer.Option(metavar="N", help="Tokens between two choices.")] = 128,
    policies: Annotated[str, typer.Option(metavar="NAME,...", help="Which to check.")] = "snapkv,keydiff",
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Hub id or folder; the default model.")] = None,
    record: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was found as JSON.")] = None,
) -> None:
    """Check how far kvpress's DecodingPress and headwise move late predictions, at the same rows."""
    names = policies.split(",")
    unknown = [name for name in names if name not in PAIRS]
    if unknown:
        raise ConfigurationError(f"nothing of kvpress to check {unknown[0]!r} against; there is: {', '.join(PAIRS)}")
    folder_or_id = model or str(find_default_model())
    subject = Subject(*load(folder_or_id, torch.float32, torch.device("cpu")))
    task = Long(tuple(text or ()), context, steps, passages, first_token, undo_marks, last=min(last, steps))
    ask = {"model": folder_or_id, "threads": torch.get_num_threads()}
    sizes = {"target": target, "interval": interval}
    rows = [
        row
        for item in task.items(subject.tokenizer)
        for row in measure(task, subject, item, names, sizes, ask, kvpress)
    ]
    show(rows)
    if record is not None:
        found = {"versions": describe_versions(), "machine": describe_machine(torch.device("cpu")), "rows": rows}
        record.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run it from the command line; errors take one line."""
    try:
        typer.run(check)
    except HeadwiseError as error:
        message(f"error: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
