"""Trials: a changed text or library, and tests -> a process forked off this one, and what came of them in it."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import linecache
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mutation.parts import ROOT


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


def compiled(path: Path, text: str, folder: Path) -> Path:
    """The library of the sources with that file changed, built in another folder."""
    shutil.copytree(path.parent, folder / "csrc")
    (folder / "csrc" / path.name).write_text(text, encoding="utf-8")
    build = [sys.executable, str(folder / "csrc" / "compile.py")]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{path.name} does not compile with {text!r}:\n{done.stderr[-2000:]}")
    return Path(done.stdout.strip())
