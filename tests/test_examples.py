"""The scripts of examples/ run from their first line to their last; notebooks do in `make test-notebooks`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import chatty

EXAMPLES = Path(__file__).parents[1] / "examples"
# What makes each of them small, and what it says at its end.
SMALL = {
    "planted_fact.py": (("--trials", "1", "--tokens", "60", "--recovery", "0.9"), "full"),
    "many_questions.py": (("--file", "text.txt", "--new-tokens", "3", "Who?", "Where?"), "% of the bytes held"),
}


@pytest.mark.parametrize("script", [path.name for path in sorted(EXAMPLES.glob("*.py"))])
def test_an_example_runs(script, tmp_path):
    arguments, says = SMALL[script]
    chatty.save(tmp_path, positions=1024)
    (tmp_path / "text.txt").write_text(chatty.TEXT * 3, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:headwise", str(EXAMPLES / script), *arguments],
        cwd=tmp_path,
        env=os.environ | {"HEADWISE_MODEL": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
