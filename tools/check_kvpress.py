"""Check kvpress: a prompt -> whether kvpress keeps the same tokens of it as headwise's baselines, and if not, why.

    PYTHONPATH=src python tools/check_kvpress.py --kvpress ../kvpress-env/bin/python

Both read the same tokens with the same model, in fp32 on the CPU. A token that only one of them keeps is put down to
the count (both rank it alike, but one keeps more), to float noise (its score and the last that is kept are nearly
equal), or to the method.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from headwise.cli.loading import load
from headwise.cli.tables import message, output, plain_table
from headwise.errors import ConfigurationError, HeadwiseError
from headwise.eval.cache_kinds import PolicyCache
from headwise.eval.task import Subject
from headwise.hosts.transformers.models import find_default_model
from headwise.measure.machine import describe_machine, describe_versions
from headwise.measure.texts import read_documents, take_passages
from headwise.policies import Policy, create_policy
from headwise.types import Bool, Float, Int, Tensor

_OTHER_SIDE = Path(__file__).with_name("kvpress_kept.py")

# Scores so near to the last that is kept, relative to it, differ by the order of a sum.
_NOISE = 1e-5


@dataclass(frozen=True)
class Pair:
    """A policy and what kvpress calls it.

    Attributes:
        presses: classes, the outermost first.
        shared_by: axes of `[layers, heads, columns]` whose tokens compete for one budget.
        note: what is known to differ.
    """

    policy: Policy
    presses: tuple[str, ...]
    shared_by: int = 1
    note: str = ""


# The budget is set for each run; this one stands in for it.
_ANY = 1

PAIRS = {
    "snapkv": Pair(create_policy("snapkv", keep=_ANY), ("SnapKVPress",)),
    "pyramidkv": Pair(
        create_policy("pyramidkv", keep=_ANY),
        ("PyramidKVPress",),
        note="The budget of a layer is rounded from a share there, and from a count here.",
    ),
    "adakv": Pair(create_policy("adakv", keep=_ANY), ("AdaKVPress", "SnapKVPress"), shared_by=2),
    "adakv-keydiff": Pair(
        create_policy("adakv", keep=_ANY, over=create_policy("keydiff", keep=_ANY)),
        ("AdaKVPress", "KeyDiffPress"),
        shared_by=2,
    ),
    "tova": Pair(create_policy("tova", keep=_ANY), ("TOVAPress",)),
    "keynorm": Pair(
        create_policy("keynorm", keep=_ANY),
        ("KnormPress",),
        note="The keys of equal tokens are equally long in the first layer; headwise takes the first of them.",
    ),
    "keydiff": Pair(create_policy("keydiff", keep=_ANY), ("KeyDiffPress",)),
    "expected-attention": Pair(create_policy("expected-attention", keep=_ANY), ("ExpectedAttentionPress",)),
    "kvzip": Pair(
        create_policy("kvzip", keep=_ANY),
        ("KVzipPress",),
        shared_by=3,
        note="kvpress prunes a share of all tokens of the model, rounded once; headwise keeps a count per head. "
        "kvpress is told that no chat template stands before the prompt: it would not repeat that much of it.",
    ),
    "streamingllm": Pair(create_policy("streamingllm", window=_ANY), ("StreamingLLMPress",)),
}


@dataclass(frozen=True)
class Agreement:
    """How far two choices of tokens are the same.

    Attributes:
        theirs, ours: tokens kept per head, on average.
        identical: share of the heads of all layers that keep the same set.
        overlap: tokens that both keep over tokens that one of them keeps, the mean over the heads.
        differing: tokens that one of them keeps; of these
        by_count: those between the two budgets, and
        by_noise: those whose score is at the cut.
        farthest: of the other ones, the largest distance from the cut, relative to it.
    """

    theirs: float
    ours: float
    identical: float
    overlap: float
    differing: int
    by_count: int
    by_noise: int
    farthest: float

    @property
    def by_method(self) -> int:
        """Differing tokens that neither the count nor float noise explains."""
        return self.differing - self.by_count - self.by_noise


def agree(
    theirs: Bool[Tensor, "layers h t"], ours: Bool[Tensor, "layers h t"], scores: Float[Tensor, "layers h t"], axes: int
) -> Agreement:
    """Compare what they keep by those scores with what we keep.

    Args:
        axes: how many of the last ones compete for one budget.
    """
    both, either = (theirs & ours).sum(dim=-1), (theirs | ours).sum(dim=-1)
    pools = [tensor.reshape(-1, math.prod(tensor.shape[-axes:])) for tensor in (theirs, ours)]
    worth = scores.reshape(pools[0].shape)
    differing = pools[0] ^ pools[1]
    sizes = torch.stack([pool.sum(dim=-1, keepdim=True) for pool in pools])
    between = (_ranks(worth) >= sizes.amin(dim=0)) & (_ranks(worth) < sizes.amax(dim=0)) & differing
    distance = _distance(worth, sizes)
    near = (distance <= _NOISE) & differing & ~between
    rest = distance[differing & ~between & ~near]
    return Agreement(
        theirs=float(theirs.sum(dim=-1).double().mean()),
        ours=float(ours.sum(dim=-1).double().mean()),
        identical=float((theirs == ours).all(dim=-1).double().mean()),
        overlap=float((both / either.clamp(min=1)).double().mean()),
        differing=int(differing.sum()),
        by_count=int(between.sum()),
        by_noise=int(near.sum()),
        farthest=float(rest.max()) if len(rest) else 0.0,
    )


def _ranks(worth: Float[Tensor, "pools n"]) -> Int[Tensor, "pools n"]:
    return worth.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _distance(worth: Float[Tensor, "pools n"], sizes: Int[Tensor, "sides pools 1"]) -> Float[Tensor, "pools n"]:
    """From the nearer of the two last scores that a budget of that size keeps, relative to it."""
    ordered = worth.sort(dim=-1, descending=True).values
    cuts = [ordered.gather(-1, (size - 1).clamp(min=0)) for size in sizes]
    tiny = torch.finfo(worth.dtype).tiny
    return torch.stack([(worth - cut).abs() / cut.abs().clamp(min=tiny) for cut in cuts]).amin(dim=0)


def ask_kvpress(python: str, request: dict[str, Any]) -> dict[str, Any]:
    """Have the other interpreter do the request, which names the folder of its files; returns its versions.

    Raises:
        ConfigurationError: when it cannot be started.
        HeadwiseError: when it fails; its own last words went to standard error.
    """
    try:
        done = subprocess.run(
            [python, str(_OTHER_SIDE)], input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=False
        )
    except OSError as error:
        raise ConfigurationError(f"cannot start {python!r}: {error.strerror or error}") from error
    if done.returncode:
        raise HeadwiseError(
            f"{python} ended with exit code {done.returncode}; it needs kvpress, see what it said above"
        )
    versions: dict[str, Any] = json.loads(done.stdout)
    return versions


def kept_of_prompt(subject: Subject, ids: Int[Tensor, "1 t"], policy: Policy) -> Bool[Tensor, "layers h t"]:
    """Which columns of the prompt every head keeps."""
    stores = [layer.core.store for layer in subject.read(ids, PolicyCache(policy)).cache.headwise_layers]
    layers = []
    for store in stores:
        occupied = store.occupied()
        # What lies beyond a head's length is undefined: it is written to a column that is cut off.
        columns = store.kept_columns().long().masked_fill(~occupied, ids.shape[1])
        kept = torch.zeros(*columns.shape[:2], ids.shape[1] + 1, dtype=torch.bool).scatter(2, columns, True)
        layers.append(kept[:, :, :-1])
    return torch.cat(layers)


def compare(subject: Subject, ids: Int[Tensor, "1 t"], files: dict[tuple[str, float], Path]) -> list[dict[str, Any]]:
    """One row for every pair and share."""
    rows = []
    for (name, share), file in files.items():
        message(f"headwise: {file.stem}\n")
        pair, found = PAIRS[name], load_file(file)
        # A fraction is rounded up here and down there: both get the count that came of it there.
        count = round(float(found["kept"].sum(dim=-1).double().mean()))
        ours = kept_of_prompt(subject, ids, pair.policy.with_keep(count))
        agreement = agree(found["kept"], ours, found["scores"], pair.shared_by)
        rows.append({"policy": name, "share": share, "by_method": agreement.by_method, **asdict(agreement)})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table, and what is known about the policies that differ."""
    table = plain_table(
        "policy",
        "share",
        "kept there",
        "here",
        "same heads",
        "overlap",
        "differ",
        "count",
        "noise",
        "method",
        "farthest",
    )
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['share']:g}",
            f"{row['theirs']:.2f}",
            f"{row['ours']:.2f}",
            f"{row['identical']:.1%}",
            f"{row['overlap']:.4f}",
            *(f"{row[name]:,}" for name in ("differing", "by_count", "by_noise", "by_method")),
            f"{row['farthest']:.1e}" if row["by_method"] else "",
        )
    console = output()
    console.print(table)
    for name in dict.fromkeys(row["policy"] for row in rows if row["differing"]):
        if PAIRS[name].note:
            console.print(f"{name}: {PAIRS[name].note}")


def check(
    kvpress: Annotated[str, typer.Option(metavar="PYTHON", help="A Python that has kvpress.")],
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Instead of Python's manual.")] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of the prompt.")] = 1024,
    shares: Annotated[str, typer.Option(metavar="SHARE,...", help="Of the prompt, to keep.")] = "0.5,0.25,0.1",
    policies: Annotated[str, typer.Option(metavar="NAME,...", help="Which to check.")] = ",".join(PAIRS),
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Hub id or folder; the default model.")] = None,
    record: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was found as JSON.")] = None,
) -> None:
    """Check that headwise's baselines keep the tokens that kvpress's presses keep, head by head."""
    names = policies.split(",")
    unknown = [name for name in names if name not in PAIRS]
    if unknown:
        raise ConfigurationError(f"nothing of kvpress to check {unknown[0]!r} against; there is: {', '.join(PAIRS)}")
    folder_or_id = model or str(find_default_model())
    subject = Subject(*load(folder_or_id, torch.float32, torch.device("cpu")))
    passage = take_passages(subject.tokenizer, read_documents(text or []), tokens, 1)[0]
    ids = torch.tensor([passage.ids])
    subject.check_room(tokens)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [(name, float(share)) for name in names for share in shares.split(",")]
        files = {(name, share): Path(folder) / f"{name} {share:g}.safetensors" for name, share in wanted}
        runs = [{"name": files[n, s].stem, "presses": PAIRS[n].presses, "share": s} for n, s in wanted]
        request = {"model": folder_or_id, "threads": torch.get_num_threads(), "ids": ids.tolist()}
        theirs = ask_kvpress(kvpress, {**request, "folder": folder, "runs": runs})
        rows = compare(subject, ids, files)
    show(rows)
    if record is not None:
        found = {
            "versions": describe_versions(),
            "kvpress": theirs,
            "machine": describe_machine(torch.device("cpu")),
            "model": model or "default",
            "text": passage.document,
            "tokens": tokens,
            "ids_sha256": hashlib.sha256(json.dumps(passage.ids).encode()).hexdigest(),
            "rows": rows,
        }
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
