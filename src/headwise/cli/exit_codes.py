"""Exit codes: how a command ended -> the number it leaves with; 0 when all went well."""

from __future__ import annotations

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 1
