"""Prompt file: a file of JSON objects, one per line or in one list, perhaps compressed -> the objects."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from headwise.errors import InputError
from headwise.files import decode_text, read_bytes

_GZIP = b"\x1f\x8b"


def read_records(file: str | Path) -> list[dict[str, Any]]:
    """The objects in the order of the file. Its content decides how it is read, not its name.

    Raises:
        InputError: when there is no such file, or it holds anything but JSON objects.
    """
    name = repr(str(file))
    text = decode_text(_decompress(read_bytes(file), name), name).strip()
    if text.startswith("["):
        entries = [(f"entry {index} of {name}", entry) for index, entry in enumerate(_parse(text, name))]
    else:
        # Not splitlines(): a string may hold other separators, such as U+2028.
        lines = [(f"line {number} of {name}", line) for number, line in enumerate(text.split("\n"), start=1)]
        entries = [(where, _parse(line, where)) for where, line in lines if line.strip()]
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise InputError(f"{where} must be a JSON object with a field for the prompt, got {entry!r:.60}")
    if not entries:
        raise InputError(f"{name} holds no records; one JSON object per line was expected")
    return [entry for _, entry in entries]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def _decompress(data: bytes, name: str) -> bytes:
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name} is a broken gzip file: {error}") from error
