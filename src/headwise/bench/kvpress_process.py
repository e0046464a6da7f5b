"""kvpress process: another Python that has kvpress -> its caches as contenders of ours, one JSON line each way."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from headwise.bench.contender_run import ContenderRun
from headwise.bench.contenders import Contender, dtype_name
from headwise.bench.record import Held, Prefill
from headwise.errors import ConfigurationError, HeadwiseError
from headwise.types import Int, Tensor

_SCRIPT = Path(__file__).with_name("kvpress_worker.py")


class KvpressError(HeadwiseError):
    """The other process did not do what it was asked for; the message says why."""


class KvpressProcess:
    """Another interpreter that holds the same model, and runs caches of kvpress when asked to.

    Args:
        python: the interpreter; its environment has kvpress.

    Raises:
        ConfigurationError: when it cannot be started.
    """

    def __init__(self, python: str) -> None:
        self._python = python
        # Between a request and its answer; stays so when an interrupt comes in between, or the other process ends.
        self._busy = False
        # A file, not a pipe: nobody reads it unless something goes wrong, and a full pipe would stop the process.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # for its life
        try:
            self._process = subprocess.Popen(
                [python, str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                # An interrupt from the keyboard is for this process, which then ends the other.
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise ConfigurationError(f"cannot start {python!r}: {error.strerror or error}") from error

    def load(self, model: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Load the model; returns the versions of what does it.

        Args:
            model: {"folder": name} or {"config": dimensions}.
        """
        return self.ask("load", **model, dtype=dtype_name(dtype), device=str(device), threads=torch.get_num_threads())

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer.

        Raises:
            KvpressError: when the process says that it failed, or says nothing any more.
            torch.OutOfMemoryError: when its device has too little memory.
        """
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None and pipe_out is not None
        if self._busy:
            raise KvpressError("it was broken off")
        self._busy = True
        try:
            pipe_in.write(json.dumps({"do": what, **details}) + "\n")
            pipe_in.flush()
            answer = json.loads(pipe_out.readline())
        except (OSError, ValueError) as error:
            raise KvpressError(f"{self._python} ended: {self._last_words()}") from error
        self._busy = False
        if not isinstance(answer, dict):
            raise KvpressError(f"{self._python} gave an answer that is none: {answer!r}")
        if answer.get("out_of_memory"):
            raise torch.OutOfMemoryError(answer["error"])
        if "error" in answer:
            raise KvpressError(str(answer["error"]))
        return answer

    def close(self, patience: float = 2.0) -> None:
        """End it; by force where it is at work, or has not ended by itself after so many seconds."""
        if self._busy:
            self._process.kill()
        if self._process.stdin is not None:
            # It may be gone already.
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        if self._errors.closed:
            return "it was closed"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1] if lines else "it said nothing"


class KvpressRun(ContenderRun):
    """A cache of kvpress in the other process.

    Args:
        contender: names the press and the share to keep.
    """

    def __init__(self, contender: Contender, process: KvpressProcess) -> None:
        super().__init__(contender)
        self._process = process
        self._held = Held(0, 0, 0.0)

    def prefill(self, ids: Int[Tensor, "b t"], repeats: int = 1) -> Prefill:
        """Read the prompt into a new cache."""
        answer = self._ask(
            "prefill", ids=ids.tolist(), repeats=repeats, press=self.contender.backend, keep=self.contender.keep
        )
        return Prefill(float(answer["seconds"]), ids.numel())

    def decode(self, ids: Int[Tensor, "b t"]) -> float:
        """Feed the tokens one by one."""
        return float(self._ask("decode", ids=ids.tolist())["seconds"])

    def held(self) -> Held:
        """As of its last answer."""
        return self._held

    def close(self) -> None:
        """Drop the cache; the process goes on for the next."""
        # One that is gone has dropped everything.
        with contextlib.suppress(KvpressError):
            self._ask("drop")

    def _ask(self, what: str, **details: Any) -> dict[str, Any]:
        answer = self._process.ask(what, name=self.contender.name, **details)
        if "allocated_bytes" in answer:
            self._held = Held(answer["used_bytes"], answer["allocated_bytes"], float(answer["kept_ratio"]))
        return answer
