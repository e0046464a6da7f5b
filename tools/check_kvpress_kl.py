"""Check kvpress's KL: passages -> how far kvpress moves the predictions of what follows, and how far headwise does.

    PYTHONPATH=src python tools/check_kvpress_kl.py --kvpress ../kvpress-env/bin/python --text wikitext.txt

Both compress the same tokens with the same model, in fp32 on the CPU, and both are held against the same predictions of
the full cache: what `headwise eval fidelity` measures.
"""

from __future__ import annotations

import json
import tempfile
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
from headwise.eval.fidelity import Fidelity, compare
from headwise.eval.task import Item, Subject
from headwise.hosts.transformers.models import find_default_model
from headwise.measure.machine import describe_machine, describe_versions


def measure(
    task: Fidelity, subject: Subject, item: Item, wanted: list[tuple[str, float]], ask: dict[str, Any], python: str
) -> list[dict[str, Any]]:
    """One row for every pair and share, of one passage."""
    ids = task.ids(subject, item)
    reference = task.reference(subject, item)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = [{"name": f"{name} {share:g}", "presses": PAIRS[name].presses, "share": share} for name, share in wanted]
        passage = {"ids": ids[:, : task.context].tolist(), "following": ids[:, task.context : -1].tolist()}
        ask_kvpress(python, {**ask, **passage, "folder": folder, "runs": runs})
        for (name, share), run in zip(wanted, runs, strict=True):
            message(f"headwise: {run['name']}\n")
            found = load_file(Path(folder) / f"{run['name']}.safetensors")
            theirs, _ = compare(reference, found["predictions"], ids[0, task.context + 1 :])
            # A fraction is rounded up here and down there: both get the count that came of it there.
            count = round(float(found["kept"].sum(dim=-1).double().mean()))
            kind = PolicyCache(PAIRS[name].policy.with_keep(count))
            ours = task.measure(subject, item, kind, reference).metrics
            place = {"document": item.data["document"], "start": item.data["start"]}
            rows.append({"policy": name, "share": share, **place, "theirs": theirs["kl"], "ours": ours["kl"]})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = plain_table("policy", "share", "start", "KL there", "here")
    for row in rows:
        table.add_row(
            row["policy"], f"{row['share']:g}", f"{row['start']:,}", f"{row['theirs']:.4f}", f"{row['ours']:.4f}"
        )
    console = output()
    console.print(table)
    if any(row["policy"] == "streamingllm" for row in rows):
        console.print(
            "streamingllm: headwise's window moves on with the text; kvpress's stays at the end of the context."
        )


def check(
    kvpress: Annotated[str, typer.Option(metavar="PYTHON", help="A Python that has kvpress.")],
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Instead of Python's manual.")] = None,
    undo_marks: Annotated[bool, typer.Option(help="Write WikiText's marks as the signs they stand for.")] = False,
    first_token: Annotated[int | None, typer.Option(metavar="ID", help="To put before every passage.")] = None,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens that are compressed.")] = 2048,
    steps: Annotated[int, typer.Option(metavar="N", help="Tokens that are fed.")] = 256,
    passages: Annotated[int, typer.Option(metavar="N", help="Of every file.")] = 3,
    shares: Annotated[str, typer.Option(metavar="SHARE,...", help="Of the context, to keep.")] = "0.5,0.25,0.1",
    policies: Annotated[str, typer.Option(metavar="NAME,...", help="Which to check.")] = ",".join(PAIRS),
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Hub id or folder; the default model.")] = None,
    record: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was found as JSON.")] = None,
) -> None:
    """Check that kvpress's presses and headwise's baselines move the predictions equally far."""
    names = policies.split(",")
    unknown = [name for name in names if name not in PAIRS]
    if unknown:
        raise ConfigurationError(f"nothing of kvpress to check {unknown[0]!r} against; there is: {', '.join(PAIRS)}")
    folder_or_id = model or str(find_default_model())
    subject = Subject(*load(folder_or_id, torch.float32, torch.device("cpu")))
    task = Fidelity(tuple(text or ()), context, steps, passages, first_token, undo_marks)
    wanted = [(name, float(share)) for name in names for share in shares.split(",")]
    ask = {"model": folder_or_id, "threads": torch.get_num_threads()}
    rows = [row for item in task.items(subject.tokenizer) for row in measure(task, subject, item, wanted, ask, kvpress)]
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
