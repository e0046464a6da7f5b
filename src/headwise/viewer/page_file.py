"""Page file: recordings of one or two policies -> one HTML file that shows them and needs nothing else."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from headwise.files import write_text
from headwise.viewer.recording import Recording

# In the order in which they are run.
_SCRIPTS = ("data.js", "colours.js", "heads.js", "text.js", "main.js")


def write_page(recordings: Sequence[Recording], model: str, target: Path) -> None:
    """Write the page.

    Args:
        recordings: of the same prompt; one, or two that are shown side by side.
        model: its name.

    Raises:
        InputError: when the file cannot be written.
    """
    data = {"model": model, "panels": [_panel(recording) for recording in recordings]}
    # Nothing in a text may end the element that holds it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _asset("viewer.html")
    parts = {"STYLE": _asset("viewer.css"), "SCRIPT": "\n".join(map(_asset, _SCRIPTS)), "DATA": text}
    for name, content in parts.items():
        page = page.replace(f"<!--{name}-->", content, 1)
    write_text(target, page)


def _panel(recording: Recording) -> dict[str, Any]:
    return {
        "policy": recording.policy,
        "formats": [{"name": name, "bits": bits} for name, bits in recording.formats],
        "cells": recording.cells,
        "pieces": recording.pieces,
        "prompt": recording.prompt,
        "held": _packed(recording),
        "moments": [
            {
                "seen": moment.seen,
                "headBytes": moment.head_bytes,
                "fullHeadBytes": moment.full_head_bytes,
                "rules": moment.rules,
                "allocated": moment.allocated_bytes,
                "full": moment.full_bytes,
                "attention": [round(share, 4) for share in shares],
            }
            for moment, shares in zip(recording.moments, recording.attention, strict=True)
        ],
    }


def _packed(recording: Recording) -> str:
    """What is held at every moment `[moments, heads, tokens]`, each as its difference to the one before, compressed.

    Little changes from one to the next, so that most of it is zeros.
    """
    total = len(recording.pieces)
    before = np.zeros((len(recording.cells), total), dtype=np.uint8)
    changes = []
    for moment in recording.moments:
        now = np.pad(moment.held, ((0, 0), (0, total - moment.seen)))
        changes.append(now ^ before)
        before = now
    return base64.b64encode(zlib.compress(np.stack(changes).tobytes(), 9)).decode()


def _asset(name: str) -> str:
    return files("headwise.viewer").joinpath("page", name).read_text(encoding="utf-8")
