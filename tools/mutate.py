"""Mutate: the package with one small mistake at a time -> how many of them the tests find, and those they do not.

    python tools/mutate.py --against quick --out mutants.json     # the cases that `make test` runs
    python tools/mutate.py --against all --again mutants.json     # would more cases have found what escaped?

Mistakes in Python come from cosmic-ray, a sample by a fixed seed; those in C++ and Triton are `mutation/mistakes.py`.
No file is changed: each mutant runs in a process forked off one with torch and transformers already imported, and
takes the changed text of one module from memory, or another compiled library. Writes JSON and, beside it, a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mutation.mistakes import CPU, TRITON
from mutation.mutants import CAUGHT, ESCAPED, Mutant, by_hand, sample
from mutation.parts import DEVICE, PYTHON, ROOT, Part, arguments
from mutation.trials import Trial, compiled, warm_up


def baseline(parts: list[Part]) -> dict[str, float]:
    """Seconds that the tests of every part take without a mistake; they must pass."""
    taken = {}
    for part in parts:
        code, said, taken[part.name] = Trial(arguments(part), 1800).wait()
        if code != 0:
            raise SystemExit(f"the tests of {part.name} fail without a mistake ({code}):\n{said[-2000:]}")
        tell(f"{part.name}: the tests pass in {taken[part.name]:.0f} s")
    return taken


def judge(mutants: list[Mutant], parts: dict[str, Part], usual: dict[str, float], at_once: int) -> None:
    """Run the tests of every mutant's part, some mutants at a time, and note in it what came of it."""
    waiting, running = list(reversed(mutants)), {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            while waiting or running:
                while waiting and len(running) < at_once:
                    mutant = waiting.pop()
                    path, library = ROOT / mutant.file, None
                    if path.suffix != ".py":
                        library = compiled(path, mutant.text, Path(folder) / str(len(waiting)))
                    text = (path, mutant.text) if library is None else None
                    # Twice a test's usual time may be the neighbours; much more is a loop without an end.
                    timeout = 30 + 4 * usual[mutant.part]
                    running[len(waiting)] = (
                        mutant,
                        Trial(arguments(parts[mutant.part]), timeout, text=text, library=library),
                    )
                for number, (mutant, trial) in list(running.items()):
                    found = trial.result()
                    if found is not None:
                        note(mutant, *found)
                        del running[number]
                time.sleep(0.05)
    finally:
        for _, trial in running.values():
            trial.stop()


def note(mutant: Mutant, code: int | None, said: str, seconds: float) -> None:
    """What came of it."""
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    mutant.outcome, mutant.seconds, mutant.text = ESCAPED if code == 0 else CAUGHT, round(seconds, 1), ""
    mutant.by = "" if code == 0 else "time" if code is None else failed[0][:160] if failed else f"exit status {code}"
    tell(f"{mutant.outcome:8}{seconds:5.0f} s  {mutant.file}:{mutant.line}  {mutant.what}  {mutant.by}")


def table(mutants: list[Mutant]) -> str:
    """Markdown: a row per file, and the mutants that escaped."""
    lines = ["| file | mutants | caught | escaped |", "|---|---:|---:|---:|"]
    files = sorted({mutant.file for mutant in mutants})
    for name, mine in [*((f"`{f}`", [m for m in mutants if m.file == f]) for f in files), ("all", mutants)]:
        escaped = sum(mutant.outcome == ESCAPED for mutant in mine)
        lines.append(f"| {name} | {len(mine)} | {len(mine) - escaped} | {escaped} |")
    for mutant in mutants:
        if mutant.outcome == ESCAPED:
            lines += ["", f"{mutant.file}:{mutant.line}, {mutant.what}", "", "```diff", mutant.diff, "```"]
    return "\n".join(lines) + "\n"


def tell(line: str) -> None:
    """To the person who waits."""
    sys.stderr.write(line + "\n")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", choices=["quick", "all"], default="quick", help="the cases of make test, or all")
    parser.add_argument("--sample", type=int, default=300, help="mutants in Python")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["python", "device"], help="one half of it")
    parser.add_argument("--within", default="", help="only files whose path has this in it")
    parser.add_argument("--again", type=Path, help="a JSON of an earlier run: only those that escaped then")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    return parser.parse_args()


def wanted(asked: argparse.Namespace) -> Iterator[Mutant]:
    """The mutants of this run."""
    if asked.only != "device":
        yield from sample(PYTHON, asked.sample, asked.seed, asked.within)
    if asked.only != "python":
        yield from (mutant for mutant in by_hand(CPU + TRITON) if asked.within in mutant.file)


def main() -> None:
    """Make them, try them, and write what came of it."""
    asked = options()
    if asked.against == "all":
        os.environ["HEADWISE_ALL_CASES"] = "1"
    mutants = list(wanted(asked))
    if asked.again:
        before = [Mutant(**each) for each in json.loads(asked.again.read_text(encoding="utf-8"))["mutants"]]
        keys = {mutant.key for mutant in before if mutant.outcome == ESCAPED}
        mutants = [mutant for mutant in mutants if mutant.key in keys]
    parts = {part.name: part for part in PYTHON + DEVICE}
    warm_up()
    usual = baseline([parts[name] for name in dict.fromkeys(mutant.part for mutant in mutants)])
    began = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        judge(mutants, parts, usual, asked.at_once)
    # What was found out by then is kept; places were drawn in no order, so it is a smaller sample.
    mutants = [mutant for mutant in mutants if mutant.outcome]
    about = {"against": asked.against, "seed": asked.seed, "seconds": round(time.monotonic() - began)}
    # Of those tests alone, as on a machine of one's own.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = {
        **about,
        "processor_seconds": round(used.ru_utime + used.ru_stime),
        "mutants": [asdict(mutant) for mutant in mutants],
    }
    asked.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    asked.out.with_suffix(".md").write_text(table(mutants), encoding="utf-8")
    sys.stdout.write(table(mutants))


if __name__ == "__main__":
    main()
