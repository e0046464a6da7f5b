"""Continuations: a text -> JSON lines of passages at equal steps and what follows each, for `headwise eval generation`.

python tools/continuations.py wiki.valid.txt > passages.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from headwise import load_default_model

PASSAGES, PROMPT, ANSWER = 8, 1500, 128


def main() -> None:
    """Print the passages of the text that is named, WikiText's <unk> as a word."""
    _, tokenizer = load_default_model()
    text = Path(sys.argv[1]).read_text(encoding="utf-8").replace("<unk>", "unknown")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    step = (len(ids) - PROMPT - ANSWER) // PASSAGES
    for at in range(0, PASSAGES * step, step):
        prompt, answer = ids[at : at + PROMPT], ids[at + PROMPT : at + PROMPT + ANSWER]
        line = {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(answer)}
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
