"""Worker: a part by name -> a line of JSON for each of its cases that begins and ends; runs in a process of its own.

    python -m on_gpu.worker on_gpu.kernels:cases --lines FILE [--tiny] [--share 0/4] [--skip 12]

A case that fails is reported and the next one begins. Where the device has failed for good, the process ends with
`DEVICE_DEAD`, and another one goes on behind that case.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from on_gpu.cases import Case, Setting, Wrong

DEVICE_DEAD = 3

_TRACEBACK_LINES = 12


def main() -> int:
    """Run the cases of a part that are this process's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--skip", type=int, default=0)
    options = parser.parse_args()
    number, shares = map(int, options.share.split("/"))
    with options.lines.open("a", encoding="utf-8") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()

        module, name = options.part.split(":")
        setting = Setting(options.tiny, lambda figures: write(so_far=figures))
        cases: list[Case] = getattr(importlib.import_module(module), name)(setting)[number::shares]
        write(planned=[case.name for case in cases])
        for case in cases[options.skip :]:
            write(begun=case.name, at=time.time())
            started = time.perf_counter()
            found = outcome_of(case)
            dead = is_dead()
            write(ended=case.name, seconds=round(time.perf_counter() - started, 3), **found)
            if dead:
                return DEVICE_DEAD
    return 0


def outcome_of(case: Case) -> dict[str, Any]:
    """How a case went, with its figures, or with what it failed by."""
    try:
        return {"outcome": "passed", "figures": case.run()}
    except Wrong as wrong:
        return {"outcome": "failed", "error": str(wrong), "figures": wrong.figures}
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()[-_TRACEBACK_LINES:]
        return {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:2000], "traceback": lines}


def is_dead() -> bool:
    """Whether nothing more can be asked of the device; also gives back what a case has left."""
    torch = sys.modules.get("torch")
    try:
        gc.collect()
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
