"""Mutants: sources -> the same with one small mistake, drawn by a seed or made by hand."""

from __future__ import annotations

import ast
import difflib
import functools
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutation.mistakes import Mistake
from mutation.parts import DEVICE, PACKAGE, ROOT, Part, found

CAUGHT, ESCAPED = "caught", "escaped"


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
        path = PACKAGE / "kernels" / mistake.file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        if source.count(mistake.old) != 1:
            wrong.append(f"{mistake.file}: {source.count(mistake.old)} times: {mistake.old!r}")
            continue
        part = next(part for part in DEVICE if path in found(PACKAGE, part.sources))
        text = source.replace(mistake.old, mistake.new)
        mutants.append(_mutant(path, part.name, mistake.what, source, text))
    if wrong:
        raise SystemExit("each text of tools/mutation/mistakes.py must occur once:\n" + "\n".join(wrong))
    return mutants


def _mutant(path: Path, part: str, what: str, source: str, text: str) -> Mutant:
    lines = list(difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
    line = int(lines[0].split()[1].lstrip("-").split(",")[0])
    changed = "\n".join(line for line in lines if not line.startswith("@@"))
    return Mutant(path.relative_to(ROOT).as_posix(), part, line, what, changed, text)
