"""GPU: a machine with one -> kernels checked, tokens and memory compared, speed measured; one JSON and one text file.

    PYTHONPATH=src python tools/gpu.py --out gpu-report        # or: make gpu
    TRITON_INTERPRET=1 python tools/gpu.py --tiny --out DIR    # the same script on a CPU, everything small

Needs torch, triton and transformers, and nothing else; no model is fetched. Takes at most eight minutes: every part has
a limit, and says what it did not get to. The exit status is 1 where anything is wrong; a target that is missed is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from on_gpu.report import anything_bad, record_of, text_of
from on_gpu.runner import Part, PartResult, run_part

# All together; the last part has what the others leave.
SECONDS = 470.0
PARTS = (
    Part("machine", "on_gpu.machine:cases", limit=60, case_limit=50),
    Part("kernels", "on_gpu.kernels:cases", limit=120, case_limit=45, workers=4),
    Part("tokens", "on_gpu.tokens:cases", limit=70, case_limit=45),
    Part("memory", "on_gpu.memory:cases", limit=45, case_limit=30),
    Part("speed", "on_gpu.speed:cases", limit=SECONDS, case_limit=120),
)


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder for the two files")
    parser.add_argument("--tiny", action="store_true", help="everything small, on a CPU where there is no GPU")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="leave out other parts")
    parser.add_argument("--workers", type=int, help="processes that share the cases of the kernels")
    options = parser.parse_args()
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    if options.workers is not None:
        parts = [replace(part, workers=min(part.workers, options.workers)) for part in parts]
    return run(parts, options.out, SECONDS, tiny=options.tiny)


def run(parts: Sequence[Part], out: Path, seconds: float, *, tiny: bool) -> int:
    """All parts in turn, and the two files, which are written anew behind each of them; the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    started, results = time.monotonic(), list[PartResult]()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            left = max(0.0, seconds - (time.monotonic() - started))
            allowed = replace(part, limit=min(part.limit, left))
            results.append(run_part(allowed, Path(folder), tiny=tiny, say=_say))
            record = record_of(results, time.monotonic() - started, tiny=tiny)
            (out / "gpu.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            (out / "gpu.txt").write_text(text_of(record), encoding="utf-8")
    _say((out / "gpu.txt").read_text(encoding="utf-8"))
    return int(anything_bad(results))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
