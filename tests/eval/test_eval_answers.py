"""Answers: texts compared, numbers found in them, programs run within limits."""

from __future__ import annotations

import os
import time
from decimal import Decimal
from itertools import combinations
from pathlib import Path

import pytest
from evaluating import (
    GSM8K_RECORD,
    HUMAN_EVAL_RECORD,
)
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import ConfigurationError
from headwise.eval.answers import MEASURES, final_number, program
from headwise.eval.programs import Limits, check_can_run, runs
from headwise.eval.rouge import rouge_l


def test_rouge_l_by_hand():
    # the, cat, on, mat: 4 of 6 words and of 5.
    assert rouge_l("The cat sat on the mat.", "the CAT is on mat") == pytest.approx(2 * 4 / 11)
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3)
    assert rouge_l("", "...") == 1.0
    assert rouge_l("word", "") == 0.0


words = st.lists(st.sampled_from(["a", "b", "cd"]), max_size=6)


@given(words, words)
def test_rouge_l_is_the_longest_common_subsequence(one, other):
    def subsequences(items):
        return {chosen for size in range(len(items) + 1) for chosen in combinations(items, size)}

    longest = max(len(common) for common in subsequences(one) & subsequences(other))
    expected = 2 * longest / (len(one) + len(other)) if one or other else 1.0
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)


def test_rouge_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(os.sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'headwise\[eval\]'"):
        rouge_l("a", "b")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 9 * 2 = <<9*2=18>>18 dollars.\n#### 18", "18"),
        ("#### 1,234,567.50 and 3 more", "1234567.5"),
        ("####$-5", "-5"),
        ("#### −7", "-7"),
        ("first #### 1\nthen #### 2", "2"),
        ("The answer is 42.", "42"),
        ("16-3=13", "13"),
        ("it fell to -4 degrees", "-4"),
        ("from 10-5", "5"),
        ("It costs $1,080.", "1080"),
        ("between 2, 3 and 4,000", "4000"),
        ("in 2020,500 people", "500"),
        ("no thousands: 1,2345", "2345"),
        ("a share of .5", "0.5"),
        ("3.0", "3"),
        ("-$20", "-20"),
        ("**18**", "18"),
        ("\\boxed{18}", "18"),
        ("none at all. #### ", None),
        ("no idea...", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_measures_of_answers():
    number, rouge, code = (MEASURES[name].score for name in ("number", "rouge", "code"))
    assert number(GSM8K_RECORD, "That makes 3002.00!") == 1.0
    assert number(GSM8K_RECORD, "That makes 3003.") == 0.0
    assert number({"answer": "none"}, "none") == 0.0
    assert rouge({"answer": "Blue is one."}, "blue") == pytest.approx(2 / 4)
    assert code(HUMAN_EVAL_RECORD, HUMAN_EVAL_RECORD["canonical_solution"]) == 1.0
    assert code(HUMAN_EVAL_RECORD, "    return n\n") == 0.0


def test_program_is_the_body_or_the_whole_function():
    parts = {name: HUMAN_EVAL_RECORD[name] for name in ("prompt", "entry_point", "test")}
    body = program(answer="    n = 2 * n\n\n    return n / 4\nprint(half(1))\n", **parts)
    assert body.startswith(parts["prompt"] + "    n = 2 * n\n\n    return n / 4\n")
    assert "print" not in body
    assert body.endswith("check(half)\n")
    whole = program(answer="Sure!\n```python\ndef half(n):\n    return n / 2\n```\nDone.", **parts)
    assert whole.startswith("import math\n\n\ndef half(n):\n    return n / 2\n")
    assert "Sure" not in whole and "Done" not in whole
    other = program(answer="    return 1\n```python\nprint(2)\n```", **parts)
    assert other.startswith(parts["prompt"] + "    return 1")


QUICK = Limits(seconds=2, memory_bytes=2**29, output_bytes=2**16)


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        ("assert 1 + 1 == 2", True),
        ("print('x' * 1000)", True),
        ("assert __name__ == '__main__'", True),
        ("assert False", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("def (", False),
        ("while True: pass", False),
        ("import time; time.sleep(60)", False),
        ("x = bytearray(2**30)", False),
        ("print('x' * 2**17)", False),
        ("import os; assert 'HEADWISE_TEST_SECRET' not in os.environ", True),
        ("import sys; assert sys.stdin.read() == ''", True),
        ("'\udc80'", True),
    ],
)
def test_programs_run_within_limits(source, passes, monkeypatch):
    monkeypatch.setenv("HEADWISE_TEST_SECRET", "1")
    started = time.perf_counter()
    assert runs(source, QUICK) is passes
    assert time.perf_counter() - started < 20


def test_what_a_program_starts_ends_with_it(tmp_path):
    noted = tmp_path / "pid"
    source = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(noted)!r}, "w").write(str(child.pid))
"""
    assert runs(source, QUICK)
    # Killed, and soon collected by whoever has taken it over.
    status = Path(f"/proc/{noted.read_text()}/status")
    deadline = time.perf_counter() + 10
    while status.exists() and "(zombie)" not in status.read_text() and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "(zombie)" in status.read_text()


def test_programs_are_refused_where_they_cannot_run():
    check_can_run(QUICK)
    with pytest.raises(ConfigurationError, match="cannot be run here"):
        check_can_run(Limits(memory_bytes=2**20))
