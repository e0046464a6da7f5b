"""The package itself: public names, import boundaries, file sizes, first lines."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import mistakes

import headwise

ROOT = Path(headwise.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
SOURCES = sorted(path for path in (ROOT / "kernels/cpu/csrc").iterdir() if path.suffix in (".h", ".cpp"))


def run(program):
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there_and_has_a_docstring():
    assert headwise.__all__ == sorted(headwise.__all__, key=lambda n: (not n.isupper(), n))
    for name in headwise.__all__:
        value = getattr(headwise, name)
        if name != "__version__":
            assert value.__doc__, name
            assert value.__module__.startswith("headwise."), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        headwise.nothing  # noqa: B018


def test_importing_is_free_and_has_no_side_effect():
    loaded = run("import sys, headwise; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])")
    assert loaded == "[]"


def test_policies_do_not_need_transformers():
    program = "import sys, headwise; headwise.list_policies(); print('transformers' in sys.modules)"
    assert run(program) == "False"


def test_extras_are_not_loaded_by_the_core():
    extras = ["typer", "rich", "matplotlib", "gguf", "triton", "jaxtyping", "pytest"]
    # transformers may load some of them by itself: what counts is what headwise adds.
    program = f"""
import sys, transformers
from transformers import Cache, DynamicCache, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import sdpa_mask
before = set(sys.modules)
import headwise
headwise.HeadwiseCache, headwise.load_model, headwise.Report, headwise.list_policies()
print([m for m in {extras!r} if m in set(sys.modules) - before and m != 'jaxtyping'])
"""
    assert run(program) == "[]"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_nothing_inside_imports_the_facade():
    """It imports everything: whoever imports it stands below nothing."""
    inside = [p for p in MODULES if p != ROOT / "__init__.py"]
    assert not [p for p in inside if "headwise" in imports(p)]


CORE = ("report", "stages", "policies", "less", "gate", "store", "kernels", "quant")


def test_the_core_can_be_imported_where_there_is_no_transformers():
    """Everything below the hosts, but for what needs Triton's compiler."""
    names = [
        ".".join(["headwise", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        for path in MODULES
        if path.relative_to(ROOT).parts[0] in CORE and "csrc" not in path.parts and not path.name.startswith("device_")
    ]
    assert len(names) > 80
    program = f"""
import importlib, sys
sys.modules["transformers"] = sys.modules["tokenizers"] = None
for name in {names!r}:
    importlib.import_module(name)
import headwise
headwise.list_policies()
"""
    run(program)


def test_only_hosts_and_their_users_import_transformers():
    inside = {p for p in MODULES if any(name.split(".")[0] == "transformers" for name in imports(p))}
    outside = {p.relative_to(ROOT).as_posix() for p in inside if ROOT / "hosts" / "transformers" not in p.parents}
    # What is measured are models, tokenizers and transformers' own caches, and kvpress in another interpreter;
    # evaluations and training use them as any user does.
    users = (
        "hosts/vocabulary.py",
        "measure/",
        "bench/models.py",
        "bench/kvpress_worker.py",
        "cli/",
        "eval/",
        "training/",
        "viewer/",
    )
    assert not {p for p in outside if not p.startswith(users)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_says_what_it_is_for_and_stays_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert (ast.get_docstring(ast.parse(text)) or "").strip()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_a_source_of_the_compiled_kernels_says_what_it_is_for_and_stays_small(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 300
    assert lines[0].startswith("// ")


def statements(function):
    """Lines of a function but for its signature and docstring: those list what a command or a kernel takes."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return function.end_lineno - body[0].lineno + 1


def test_functions_and_tests_stay_small():
    functions = [
        (statements(node), path.name, node.name)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(functions)[0] <= 60, max(functions)
    tests = [(len(path.read_text().splitlines()), path.name) for path in Path(__file__).parent.rglob("*.py")]
    assert max(tests)[0] <= 400, max(tests)
    stages = [(len(path.read_text().splitlines()), path.name) for path in (ROOT / "stages").glob("*.py")]
    # The layer runs them all.
    assert [name for lines, name in stages if lines > 200] == ["layer.py"]


def test_tests_share_helpers_and_not_one_another():
    for path in Path(__file__).parent.rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith("test_")], path.name


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("stages/prefill", 1),
        ("stages/profile", 2),
        ("stages/plan", 3),
        ("store/store", 4),
        ("stages/decode", 5),
        ("stages/evict", 6),
        ("report/report", 7),
    ],
)
def test_stages_are_numbered_along_the_data_path(stage, number):
    first = (ROOT / f"{stage}.py").read_text().splitlines()[0]
    assert first.startswith(f'"""{number}/7 {Path(stage).name}: ')
    assert " -> " in first


@pytest.mark.parametrize("mistake", [*mistakes.CPU, *mistakes.TRITON], ids=lambda m: f"{m.file}: {m.what}")
def test_a_mistake_to_be_tried_is_still_one(mistake):
    """Its text occurs once, as `tools/mutate.py` asks for."""
    assert (ROOT / "kernels" / mistake.file).read_text().count(mistake.old) == 1
