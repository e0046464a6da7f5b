"""Mutate: the package with one small mistake at a time -> how many of them the tests find, and those they do not.

    python tools/mutate.py --against quick --out mutants.json     # the cases that `make test` runs
    python tools/mutate.py --against all --again mutants.json     # would more cases have found what escaped?

Mistakes in Python come from cosmic-ray, a sample by a fixed seed; those in C++ and Triton are `mutants_by_hand.py`. No
file is changed: each mutant runs in a process that is forked off one with torch and transformers already imported, and
takes the changed text of one module from memory, or another compiled library. Writes JSON and, beside it, a table.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import importlib.abc
import importlib.util
import json
import linecache
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutants_by_hand import CPU, TRITON, Mistake

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "headwise"
KERNELS = PACKAGE / "kernels"
CAUGHT, ESCAPED = "caught", "escaped"


@dataclass(frozen=True)
class Part:
    """Sources, and the tests that hold them; those that fail first stand first.

    Attributes:
        sources: patterns below `src/headwise`.
        tests: arguments of pytest: patterns of files below `tests`, with `::name` behind them or not.
        keyword: what `-k` takes.
    """

    name: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]
    keyword: str = ""


# Files that are split or renamed later are found by the same patterns, or are to be changed here.
PYTHON = (
    Part(
        "store",
        ("store/*.py",),
        (
            *("test_store*.py", "test_row_parts.py", "test_quant.py", "test_decode.py"),
            *("test_oracle.py::test_short*", "test_persistence.py"),
        ),
        "not gpt and not gemma3",
    ),
    Part(
        "plan",
        ("stages/plan.py",),
        ("test_profile.py", "test_scored.py", "test_auto.py", "test_oracle.py::test_short*", "test_quant.py"),
    ),
    Part(
        "rules",
        tuple(f"policies/{name}.py" for name in ("window", "sinks", "frequent", "special", "punctuation", "base")),
        ("test_rules.py", "test_every_policy.py::test_a_sequence*", "test_profile.py", "test_oracle.py::test_short*"),
    ),
    Part("scored", ("policies/scored.py",), ("test_scored.py", "test_budgets.py", "test_gate.py")),
    Part("quant", ("quant/*.py",), ("test_quant.py", "test_auto.py", "test_cpu_codes.py")),
    Part(
        "reference",
        ("kernels/reference.py",),
        (
            *("test_decode.py", "test_cpu_kernels.py", "test_cpu_map.py", "test_cpu_obstacles.py"),
            *("test_cpu_codes.py", "test_profile.py"),
        ),
        "not compile and not library",
    ),
)
DEVICE = (
    Part(
        "cpu",
        ("kernels/cpu/csrc/*",),
        ("test_cpu_kernels.py", "test_cpu_map.py", "test_cpu_obstacles.py", "test_cpu_codes.py", "test_decode.py"),
    ),
    Part(
        "triton pages",
        ("kernels/triton/device_pages.py", "kernels/triton/device_tiles.py"),
        ("test_triton.py", "test_triton_launches.py"),
        "not compiles",
    ),
    Part("triton codes", ("kernels/triton/device_codes.py",), ("test_triton_codes.py",), "not compiles"),
    Part("triton map", ("kernels/triton/device_map.py",), ("test_triton.py",), "column_mass or see_nothing or peaks"),
)


@dataclass
class Mutant:
    """One mistake in one file, and what came of it."""

    file: str
    part: str
    line: int
    what: str
    diff: str
    text: str = ""
    outcome: str = ""
    by: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """What two runs know it by."""
        return self.file, self.diff


# Making them.


def sample(parts: tuple[Part, ...], count: int, seed: int, within: str = "") -> list[Mutant]:
    """Mutants of so many places, of all files alike: a place is drawn first, and then what is done to it."""
    generator = random.Random(seed)
    places: list[tuple[Part, Path, list[Any]]] = []
    for part in parts:
        for path in found(PACKAGE, part.sources):
            if within not in path.as_posix():
                continue
            source = path.read_text(encoding="utf-8")
            for place in _places(source):
                places.append((part, path, place))
    generator.shuffle(places)
    mutants: list[Mutant] = []
    for part, path, ways in places:
        if len(mutants) == count:
            break
        source = path.read_text(encoding="utf-8")
        generator.shuffle(ways)
        for name, operator, occurrence in ways:
            text = _mutated(source, operator, occurrence)
            if text is not None and _executed(text) not in (None, _executed(source)):
                mutants.append(_mutant(path, part.name, name, source, text))
                break
    return mutants


def _places(source: str) -> list[list[Any]]:
    """For every place where an operator of cosmic-ray applies, all that do: name, operator and occurrence."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    tree = list(ast_nodes(get_ast(source)))
    places: dict[Any, list[Any]] = {}
    for name in cosmic_ray.plugins.operator_names():
        operator_class = cosmic_ray.plugins.get_operator(name)
        if operator_class.arguments():
            continue
        operator = operator_class()
        positions = [start for node in tree for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(positions):
            places.setdefault(start, []).append((name.removeprefix("core/"), operator, occurrence))
    return [places[start] for start in sorted(places)]


def _mutated(source: str, operator: Any, occurrence: int) -> str | None:
    from cosmic_ray.mutating import mutate_code

    text: str | None = mutate_code(source, operator, occurrence)
    return text


class _Bare(ast.NodeTransformer):
    """Takes out what no test can tell: annotations, assertions that only say what a type is, promises kept anyway."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        node.keywords = [each for each in node.keywords if each.arg not in ("strict", "frozen")]
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node

    def visit_Assert(self, node: ast.Assert) -> None:
        return None


@functools.cache
def _executed(text: str) -> str | None:
    """What of a module runs, to tell mutants from the original; None where it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.dump(_Bare().visit(ast.parse(text)))
    except SyntaxError:
        return None


def by_hand(mistakes: tuple[Mistake, ...]) -> list[Mutant]:
    """The mutants of a list, after making sure that each of them changes one place of its file."""
    mutants, wrong = [], []
    for mistake in mistakes:
        path = KERNELS / mistake.file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        if source.count(mistake.old) != 1:
            wrong.append(f"{mistake.file}: {source.count(mistake.old)} times: {mistake.old!r}")
            continue
        part = next(part for part in DEVICE if path in found(PACKAGE, part.sources))
        text = source.replace(mistake.old, mistake.new)
        mutants.append(_mutant(path, part.name, mistake.what, source, text))
    if wrong:
        raise SystemExit("each text of tools/mutants_by_hand.py must occur once:\n" + "\n".join(wrong))
    return mutants


def _mutant(path: Path, part: str, what: str, source: str, text: str) -> Mutant:
    lines = list(difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
    line = int(lines[0].split()[1].lstrip("-").split(",")[0])
    changed = "\n".join(line for line in lines if not line.startswith("@@"))
    return Mutant(path.relative_to(ROOT).as_posix(), part, line, what, changed, text)


def found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """All files of those patterns; every pattern must have some."""
    paths: list[Path] = []
    for pattern in patterns:
        some = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not some:
            raise SystemExit(f"nothing matches {folder.relative_to(ROOT)}/{pattern}: change the table in {__file__}")
        paths += [path for path in some if path.name != "__init__.py" and path not in paths]
    return paths


def arguments(part: Part) -> list[str]:
    """What pytest is given for a part's tests."""
    chosen = []
    for pattern in part.tests:
        files, _, name = pattern.partition("::")
        for path in found(ROOT / "tests", (files,)):
            text = path.read_text(encoding="utf-8")
            if not name:
                chosen.append(str(path))
                continue
            names = [n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
            matching = [each for each in names if each.startswith(name.rstrip("*"))]
            if not matching:
                raise SystemExit(f"no test {pattern}: change the table in {__file__}")
            chosen += [f"{path}::{each}" for each in matching]
    return chosen + (["-k", part.keyword] if part.keyword else [])


# Trying them.


class _Served(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Finds one module, whose text is not the one on disk."""

    def __init__(self, path: Path, text: str) -> None:
        names = path.relative_to(ROOT / "src").with_suffix("").parts
        self.name = ".".join(names)
        self.path, self.text = str(path), text
        # Triton reads a kernel's source by its file name; without a time, the cache does not ask the disk.
        linecache.cache[self.path] = (len(text), None, text.splitlines(keepends=True), self.path)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: Any) -> bytes:
        # Asked for the compiled file too, which there is none of.
        if str(path) != self.path:
            raise OSError(path)
        return self.text.encode()

    def path_stats(self, path: Any) -> Any:
        raise OSError(path)


class _Examples:
    """A plugin of pytest: the same examples of hypothesis each time, and none made smaller, which takes minutes."""

    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", deadline=None, derandomize=True, database=None, phases=phases)
        settings.load_profile("mutants")


def warm_up() -> None:
    """Import what every child needs, but nothing of the package, and start no thread: children are forked off."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import torch.fx.experimental.proxy_tensor

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401
    from transformers import (  # noqa: F401
        DynamicCache,
        Gemma3ForCausalLM,
        GPT2LMHeadModel,
        GPTNeoXForCausalLM,
        GptOssForCausalLM,
        LlamaForCausalLM,
        MistralForCausalLM,
        Phi3ForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
    )

    assert not any(name.split(".")[0] == "headwise" for name in sys.modules)


class Trial:
    """The tests of a part in a process of its own, which goes on while this one does something else."""

    def __init__(
        self, tests: list[str], timeout: float, *, text: tuple[Path, str] | None = None, library: Path | None = None
    ) -> None:
        """Begin.

        Args:
            text: of a module, instead of the one on disk.
            library: of compiled kernels, instead of the one in use.
        """
        self.began, self.timeout = time.monotonic(), timeout
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.child = os.fork()
        if self.child == 0:
            _test(tests, self.said, text, library)

    def result(self) -> tuple[int | None, str, float] | None:
        """Exit status (None: out of time), what pytest said, and seconds; None while it goes on."""
        seconds = time.monotonic() - self.began
        done, status = os.waitpid(self.child, os.WNOHANG)
        if not done and seconds < self.timeout:
            return None
        if not done:
            self.stop()
        with self.said:
            self.said.seek(0)
            return os.waitstatus_to_exitcode(status) if done else None, self.said.read(), seconds

    def stop(self) -> None:
        """Break it off."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)

    def wait(self) -> tuple[int | None, str, float]:
        """The result."""
        while (found := self.result()) is None:
            time.sleep(0.05)
        return found


def _test(tests: list[str], said: Any, text: tuple[Path, str] | None, library: Path | None) -> None:
    """In the child: never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        os.chdir(ROOT)
        sys.dont_write_bytecode = True
        if library is not None:
            os.environ["HEADWISE_CPU_LIBRARY"] = str(library)
        if text is not None:
            sys.meta_path.insert(0, _Served(*text))
        import pytest

        # Plugins that were imported before the fork are none of ours.
        plain = [
            "-x",
            "--tb=line",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--rootdir",
            str(ROOT),
        ]
        code = int(pytest.main([*plain, *tests], plugins=[_Examples()]))
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(code)


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


def compiled(path: Path, text: str, folder: Path) -> Path:
    """The library of the sources with that file changed, built in another folder."""
    shutil.copytree(path.parent, folder / "csrc")
    (folder / "csrc" / path.name).write_text(text, encoding="utf-8")
    build = [sys.executable, str(folder / "csrc" / "compile.py")]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{path.name} does not compile with {text!r}:\n{done.stderr[-2000:]}")
    return Path(done.stdout.strip())


# Telling.


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
