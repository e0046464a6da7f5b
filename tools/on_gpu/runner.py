"""Runner: parts with their limits -> what came of every case; each part runs in processes of its own.

A process that crashes or hangs costs the case it was at: another one goes on behind it. A part that reaches its limit
is ended, and its cases say which were cut off and which never ran. Nothing here imports torch: whatever is broken,
there is a report.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# How a case may end. The last two are nobody's fault but the limit's.
PASSED, FAILED, CRASHED, HUNG, CUT_OFF, NOT_RUN = "passed", "failed", "crashed", "hung", "cut off", "not run"
BAD = FAILED, CRASHED, HUNG

_POLL = 0.05
_TAIL = 2000


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Attributes:
        cases: where its cases are made, as "module:function".
        limit: seconds after which it is ended.
        case_limit: seconds after which a case counts as hung.
        workers: processes that share its cases.
    """

    name: str
    cases: str
    limit: float
    case_limit: float
    workers: int = 1


@dataclass
class PartResult:
    """What came of a part.

    Attributes:
        cases: in the order in which they matter; each with `name`, `outcome`, and what else is known.
        trouble: what its processes said when they did not even begin.
    """

    name: str
    limit: float
    seconds: float = 0.0
    cases: list[dict[str, Any]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)


def run_part(part: Part, folder: Path, *, tiny: bool, say: Callable[[str], None]) -> PartResult:
    """Run all cases of a part, as far as its limit lets it.

    Args:
        folder: for what its processes write.
    """
    started = time.monotonic()
    result = PartResult(part.name, part.limit)
    workers = [_Worker(part, number, folder, tiny) for number in range(part.workers)]
    try:
        for worker in workers:
            worker.start()
        while sum(worker.goes_on(say) for worker in workers) and time.monotonic() - started < part.limit:
            time.sleep(_POLL)
    finally:
        for worker in workers:
            worker.stop()
    result.seconds = round(time.monotonic() - started, 1)
    result.trouble = [worker.trouble for worker in workers if worker.trouble]
    result.cases = _in_order([worker.cases() for worker in workers])
    return result


class _Worker:
    """One process of a part after the other, each going on where the last one ended."""

    def __init__(self, part: Part, number: int, folder: Path, tiny: bool) -> None:
        self._part, self._number, self._tiny = part, number, tiny
        base = f"{part.name.replace(' ', '-')}-{number}"
        self._lines, self._log = folder / f"{base}.jsonl", folder / f"{base}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._read = 0
        self._planned: list[str] = []
        self._ended: list[dict[str, Any]] = []
        self._now: dict[str, Any] | None = None
        self._begun_at, self._ended_before = 0.0, 0
        self.trouble = ""

    def start(self) -> None:
        """Begin, or go on behind the last case that has ended."""
        self._ended_before = len(self._ended)
        share = f"{self._number}/{self._part.workers}"
        command = [sys.executable, "-m", "on_gpu.worker", self._part.cases, "--lines", str(self._lines)]
        command += ["--share", share, "--skip", str(len(self._ended)), *(["--tiny"] if self._tiny else [])]
        path = [*(str(ROOT / name) for name in ("src", "tools", "tests")), os.environ.get("PYTHONPATH", "")]
        with self._log.open("ab") as log:
            # A group of its own, so that whatever it has started ends with it.
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
                start_new_session=True,
            )

    def goes_on(self, say: Callable[[str], None]) -> bool:
        """Take in what it has written; whether there is more to come."""
        if self._process is None:
            return False
        code = self._process.poll()
        self._take_in(say)
        hung = self._now is not None and time.monotonic() - self._begun_at > self._part.case_limit
        if code is None and not hung:
            return True
        self.stop()
        if self._now is not None:
            what = f"no answer in {self._part.case_limit:.0f} s" if hung else f"{_ended_by(code)}; {self._tail()}"
            self._end(say, {**self._now, "outcome": HUNG if hung else CRASHED, "error": what})
        elif len(self._ended) < len(self._planned) and len(self._ended) > self._ended_before:
            say(f"{self._part.name}: the device has failed, and another process goes on")
        elif code or len(self._ended) < len(self._planned):
            self.trouble = f"{_ended_by(code)}; {self._tail()}"
            say(f"{self._part.name}: {self.trouble}")
            return False
        if len(self._ended) == len(self._planned):
            return False
        self.start()
        return True

    def stop(self) -> None:
        """End its process and all that it has started, where there still is one."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def cases(self) -> list[dict[str, Any]]:
        """Everything that was planned, in its order, with what came of it."""
        self._take_in(lambda _: None)
        found = list(self._ended)
        if self._now is not None:
            found.append({**self._now, "outcome": CUT_OFF})
        return [*found, *({"name": name, "outcome": NOT_RUN} for name in self._planned[len(found) :])]

    def _take_in(self, say: Callable[[str], None]) -> None:
        if not self._lines.exists():
            return
        with self._lines.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        # A line that is still being written is read the next time.
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for text in whole.splitlines():
            line = json.loads(text)
            if "planned" in line:
                self._planned = line["planned"]
            elif "begun" in line:
                self._now, self._begun_at = {"name": line["begun"]}, time.monotonic()
            elif "so_far" in line and self._now is not None:
                self._now["figures"] = line["so_far"]
            elif "ended" in line:
                self._end(say, {"name": line.pop("ended"), **line})

    def _end(self, say: Callable[[str], None], case: dict[str, Any]) -> None:
        self._ended.append(case)
        self._now = None
        say(f"{self._part.name}: {case['name']}: {case['outcome']}")

    def _tail(self) -> str:
        """The last that it said."""
        return self._log.read_bytes()[-_TAIL:].decode(errors="replace").strip()


def _ended_by(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with status {code}"


def _in_order(shares: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Cases that were dealt out to several processes, as they were before."""
    longest = max((len(share) for share in shares), default=0)
    return [share[index] for index in range(longest) for share in shares if index < len(share)]
