"""What the tests of the bench have in common: a quick ceiling, a tiny model, plans that are not run, an interpreter."""

from __future__ import annotations

import sys
import textwrap
from functools import partial

import pytest
from benching import bench, small

import tiny
from headwise.bench import bandwidth, run
from headwise.less.checkpoint import save_kernels
from headwise.measure.texts import manual
from less_oracle import kernels_of, networks_of


@pytest.fixture(scope="module", autouse=True)
def quick_ceiling():
    """A buffer that the processor's cache holds: what it yields is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headwise.bench.rounds.measure_ceiling", partial(bandwidth.measure_ceiling, size=2**16))
        yield


@pytest.fixture(scope="module", autouse=True)
def short_manual():
    """Its beginning: tokenising all of it takes longer than a run."""
    beginning = manual()[:20_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headwise.bench.workload.manual", lambda: beginning)
        yield


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return tmp_path_factory.mktemp("picture") / "speed.png"


@pytest.fixture(scope="module")
def told(picture):
    """One run, whose JSON and picture several tests look at."""
    answer = bench(*small("--context", "24,40", "--batch", 2, "--keep", "0.5,0.25", "--json", "--png", picture))
    assert answer.code == 0, answer.err
    return answer


@pytest.fixture
def planned(monkeypatch):
    """Plans that the command line makes, none of which is run."""
    plans = []
    monkeypatch.setattr(run, "run", lambda made, *rest: plans.append(made))
    return plans


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that has a tokenizer, and kernels of LESS beside it."""
    path = tmp_path_factory.mktemp("model")
    model = tiny.llama(heads=4, kv_heads=2, layers=2, head_dim=8)
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    save_kernels(kernels_of(model, networks_of(model)), path / "kernels")
    return path


FAKE = """
    import json, sys
    assert sys.argv[1].endswith("kvpress_worker.py")
    for line in sys.stdin:
        ask = json.loads(line)
        print(json.dumps(ask), file=open(sys.argv[0] + ".log", "a"))
        held = {"used_bytes": 100, "allocated_bytes": 128, "kept_ratio": 0.25}
        answers = {
            "load": {"kvpress": "9.9"},
            "prefill": {"seconds": 2.0, **held},
            "decode": {"seconds": 0.5, **held},
            "drop": {},
        }
        print(json.dumps(answers[ask["do"]] if %r != ask["do"] else %r), flush=True)
        if ask["do"] == "decode" and %r == "die":
            sys.exit("so long")
"""


@pytest.fixture
def fake_python(tmp_path):
    def make(fails_at="", failure=None, then=""):
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(FAKE % (fails_at, failure, then)))
        path.chmod(0o755)
        return path

    return make
