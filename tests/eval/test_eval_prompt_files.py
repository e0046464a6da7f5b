"""Files of prompts as others publish them: how they are read, and which of their fields is what."""

from __future__ import annotations

import gzip
import json

import pytest
from evaluating import (
    ALPACA_RECORD,
    GSM8K_RECORD,
    HUMAN_EVAL_RECORD,
)

from headwise.errors import InputError
from headwise.eval.layouts import ALPACA_EVAL, GSM8K, HUMAN_EVAL, find_layout
from headwise.eval.prompt_file import read_records


def test_records_are_read_from_lines_a_list_or_gzip(tmp_path):
    records = [{"a": 1}, {"b": "x\u2028y"}]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    contents = {
        "lines.jsonl": lines.encode(),
        "blank.jsonl": f"\ufeff\n{lines}\n\n".encode(),
        "windows.jsonl": lines.replace("\n", "\r\n").encode(),
        "list.json": json.dumps(records).encode(),
        "lines.jsonl.gz": gzip.compress(lines.encode()),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        assert read_records(tmp_path / name) == records, name


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2 of .*bad.* is not JSON"),
        (b"[1]", "entry 0 of .* must be a JSON object .* got 1"),
        (b'{"a": 1}\n"text"\n', "line 2 .* got 'text'"),
        (b"[]", "holds no records"),
        (b"", "empty"),
        (b"\xff\xfe", "not UTF-8"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-9], "broken gzip"),
    ],
)
def test_a_file_that_is_none_says_why(tmp_path, data, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says):
        read_records(path)


def test_published_files_are_recognised():
    assert find_layout(GSM8K_RECORD, None, None) is GSM8K
    assert find_layout(HUMAN_EVAL_RECORD, None, None) is HUMAN_EVAL
    assert find_layout(ALPACA_RECORD, None, None) is ALPACA_EVAL
    # Questions with answers of another kind are no sums.
    with pytest.raises(InputError, match=r"which field is the prompt.*: question, answer;"):
        find_layout({"question": "Who?", "answer": "Ada, in 1843"}, None, None)


def test_fields_of_other_files_are_named():
    record = {"ask": "Who?", "reply": "Ada", "prompt": "p"}
    assert find_layout(record, None, None).prompt == "prompt"
    assert find_layout(record, None, None).measure is None
    layout = find_layout(record, "ask", "reply")
    assert (layout.prompt, layout.answer, layout.measure, layout.chat) == ("ask", "reply", "rouge", True)
    assert find_layout(ALPACA_RECORD, "instruction", None) is ALPACA_EVAL
    assert find_layout(ALPACA_RECORD, None, "dataset").answer == "dataset"
    with pytest.raises(InputError, match="no field 'question' in the file; it has: ask, reply, prompt"):
        find_layout(record, "question", None)
