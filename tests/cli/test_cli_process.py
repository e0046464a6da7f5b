"""The command as a process of its own: interrupted, and not listened to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SOURCE = str(Path(__file__).parents[2] / "src")


def start(folder, *arguments):
    environment = {**os.environ, "HEADWISE_MODEL": str(folder), "PYTHONPATH": SOURCE}
    return subprocess.Popen(
        [sys.executable, "-m", "headwise.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        # What runs in the background of a script ignores the interrupt, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_interrupt_leaves_with_130_and_one_line(folder, tmp_path):
    # Standard input that never ends: the command waits inside, past all imports of its own.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = start(folder, "generate", "--file", pipe)
    writer = None
    while writer is None and process.poll() is None:
        with contextlib.suppress(OSError):  # nobody reads yet
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    try:
        # A signal just before a read begins to wait wakes nobody; as a person would, it is sent again.
        for _ in range(6):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=10)
                break
    finally:
        process.kill()
        os.close(writer)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "interrupted")


def test_a_reader_who_leaves_early_hears_no_complaint(folder):
    process = start(folder, "policies", "--json")
    with process:
        process.stdout.close()
        err = process.stderr.read()
    assert err == ""
    assert process.returncode == 1


def test_help_loads_no_heavy_package():
    program = """
import sys
from headwise.cli.main import main
try:
    main(["--help"])
finally:
    print(sorted({"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)), file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "generate" in done.stdout


def test_shells_complete_commands():
    asked = {"_HEADWISE_COMPLETE": "complete_bash", "COMP_WORDS": "headwise in", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "headwise.cli.main"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["inspect"], "")
