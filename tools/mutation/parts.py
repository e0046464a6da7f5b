"""Parts: sources -> the tests that hold them, as pytest is given them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "src" / "headwise"


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
            *("test_store*.py", "test_row_parts.py", "test_quant*.py", "test_decode.py"),
            *("test_oracle.py::test_short*", "test_persistence.py"),
        ),
        "not gpt and not gemma3",
    ),
    Part(
        "plan",
        ("stages/plan.py",),
        ("test_profile.py", "test_scored.py", "test_auto.py", "test_oracle.py::test_short*", "test_quant*.py"),
    ),
    Part(
        "rules",
        tuple(f"policies/{name}.py" for name in ("window", "sinks", "frequent", "special", "punctuation", "base")),
        ("test_rules.py", "test_every_policy.py::test_a_sequence*", "test_profile.py", "test_oracle.py::test_short*"),
    ),
    Part("scored", ("policies/scored.py",), ("test_scored.py", "test_budgets.py", "test_gate.py")),
    Part("row attention", ("stages/row_attention.py",), ("test_row_attention.py", "test_choose_again_caches.py")),
    Part("viewer", ("viewer/*.py",), ("test_viewer.py",)),
    Part("fit", ("measure/fit.py", "measure/sizes.py"), ("test_fit.py",)),
    Part("quant", ("quant/*.py",), ("test_quant*.py", "test_auto.py", "test_cpu_codes.py")),
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
        (
            *("test_cpu_kernels.py", "test_cpu_map.py", "test_cpu_obstacles.py", "test_cpu_codes.py"),
            *("test_cpu_integers.py", "test_decode.py"),
        ),
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
