"""Compile: the C++ sources beside this file -> the shared library that `headwise.kernels.cpu.library` loads.

Needs a C++17 compiler (g++ or clang++; $CXX names another) and nothing else: no torch, no headers beyond the
standard library. Run by the package's build; by hand, `python compile.py` builds in place. `tools/check_memory.py`
builds one that looks at every access to memory.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = SOURCES.parent / f"libheadwise_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}"

_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall"]
# For a library that ends the process where memory is read or written that is not its own, or the language says nothing.
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")
# Name of the vector instructions -> the flags that allow them. "base" is what every processor of the kind has.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, *(f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "vbmi", "vnni"))]
_VECTORS = {"x86_64": {"base": [], "avx2": _AVX2, "avx512": _AVX512}}


def compile_library(target: Path = LIBRARY, more: tuple[str, ...] = ()) -> Path:
    """Build the library and return where it is.

    Args:
        target: where to.
        more: options of the compiler and the linker.

    Raises:
        RuntimeError: when there is no compiler, or it fails; the message says which.
    """
    if sys.platform == "win32":
        raise RuntimeError("the compiled kernels are not built on Windows")
    command = os.environ.get("CXX", "").split() or next(
        ([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), []
    )
    if not command:
        raise RuntimeError("no C++ compiler found (c++, g++ or clang++; or set CXX)")
    machine = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    with tempfile.TemporaryDirectory() as folder:
        sources = {"library": ["library.cpp"]}
        for name, flags in _VECTORS.get(machine, {"base": []}).items():
            sources[name] = [*flags, f"-DHEADWISE_ISA={name}", "isa.cpp"]
        objects = {name: Path(folder) / f"{name}.o" for name in sources}
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            calls = ([*command, *_FLAGS, *more, *what, "-c", "-o", objects[name]] for name, what in sources.items())
            list(threads.map(_run, calls))
        # Linked beside its place and moved: a process that has the old one loaded keeps it.
        linked = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            _run([*command, "-shared", *more, *objects.values(), "-o", linked])
            os.replace(linked, target)
        finally:
            linked.unlink(missing_ok=True)
    return target


def _run(command: list[str | Path]) -> None:
    try:
        done = subprocess.run([str(part) for part in command], cwd=SOURCES, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    sys.stdout.write(f"{compile_library()}\n")
