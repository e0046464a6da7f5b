"""Check memory: tests -> whether the compiled kernels touch only memory that is theirs, in all that these tests do.

Builds the kernels with the address and undefined-behaviour sanitizers into a folder of its own, sees first that these
do catch an access that is wrong, and runs the tests with them. Needs g++ or clang++ with their sanitizers, on Linux.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILE = ROOT / "src/headwise/kernels/cpu/csrc/compile.py"
# What calls compiled code: kernels, pages and stores, and whole caches on top of them.
TESTS = (
    *("cpu_kernels", "cpu_codes", "cpu_integers", "cpu_map", "kernel_borders", "page_strides", "row_parts"),
    *("store", "store_machine", "layer", "decode", "quant_cache", "contract_crop", "contract_batches", "saved"),
)

# Reads eight bytes behind a tensor.
_WRONG = """
import torch
from headwise.kernels.cpu import library
functions, parallel_for = library.library_and_threads()
numbers, sums = torch.zeros(1024, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
functions.headwise_read(numbers.data_ptr(), 1025, 1, sums.data_ptr(), parallel_for)
"""


def main() -> int:
    """Build, see that it watches, and run the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", help="of pytest, instead of the usual tests")
    options = parser.parse_args().options or [f"tests/test_{name}.py" for name in TESTS]
    with tempfile.TemporaryDirectory() as folder:
        build = runpy.run_path(str(COMPILE))
        library = build["compile_library"](Path(folder) / "libheadwise_sanitized.so", build["SANITIZED"])
        environment = watched(library)
        wrong = subprocess.run([sys.executable, "-c", _WRONG], env=environment, capture_output=True, text=True)
        if wrong.returncode == 0 or "heap-buffer-overflow" not in wrong.stderr:
            sys.stderr.write(
                f"an access behind a buffer went unseen: the sanitizers do not work here\n{wrong.stderr}\n"
            )
            return 1
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        return subprocess.run(tests, env=environment, cwd=ROOT).returncode


def watched(library: Path) -> dict[str, str]:
    """The environment of a process that uses that library; the sanitizers must be there before anything else."""
    compiler = os.environ.get("CXX", "").split() or [
        next(name for name in ("c++", "g++", "clang++") if shutil.which(name))
    ]

    def place(name: str) -> str:
        return subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()

    return {
        **os.environ,
        # The C++ library too: the sanitizer wants to know how exceptions are thrown before torch brings its own.
        "LD_PRELOAD": f"{place('libasan.so')}:{place('libstdc++.so')}",
        "HEADWISE_CPU_LIBRARY": str(library),
        # Python frees nothing at its end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


if __name__ == "__main__":
    sys.exit(main())
