"""Families: every causal language model of the installed transformers, made small -> what headwise does with each.

    python tools/families.py --out docs/families.md     all of them, as a page
    python tools/families.py llama gemma3_text          some, on the screen

Each is built at random, with a few layers of every kind it has. `Full()` must give stock's ids, and a window's logits
must be those of stock's attention with a mask; or the cache must be refused with a reason. Ends with 1 where
neither is so.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parent))

from family_models import NotBuilt, build
from family_verdict import Verdict, judge

_HEAD = """# Families

What headwise does with every causal language model of transformers {version}, each made small and random: \
`python tools/families.py --out docs/families.md`.

**Served** means that `Full()` gave the ids of transformers' own cache, and that a window over the compressed layers \
gave the logits of transformers' own attention with a mask. Layers that are not compressed keep what transformers \
gives them. **Refused** means that making a cache raises an error with the reason. A checkpoint may differ from its \
family's usual configuration, as with sliding windows: making a cache says what holds for it.

{counts}
"""


def main() -> int:
    """Judge the families asked for, and write or print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="as transformers names them; all where none is given")
    parser.add_argument("--out", type=Path, help="the page to write")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    verdicts = {}
    for family in options.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdicts[family] = verdict_of(family)
        sys.stdout.write(f"{family:28} {verdicts[family]}\n")
        sys.stdout.flush()
    if options.out:
        options.out.write_text(page(verdicts))
    wrong = [family for family, verdict in verdicts.items() if verdict.kind == "wrong"]
    sys.stdout.write(f"{counts(verdicts)}\n")
    return 1 if wrong else 0


def verdict_of(family: str) -> Verdict:
    """What headwise does with a family."""
    try:
        model = build(family)
    except NotBuilt as error:
        return Verdict("not built", str(error))
    return judge(model)


def counts(verdicts: dict[str, Verdict]) -> str:
    """How many there are of each kind."""
    kinds = [verdict.kind for verdict in verdicts.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("served", "refused", "wrong", "not built"))


def page(verdicts: dict[str, Verdict]) -> str:
    """All verdicts as a page."""
    lines = [_HEAD.format(version=transformers.__version__, counts=counts(verdicts).capitalize() + ".")]
    for kind, title, column in (
        ("served", "Served", "compressed"),
        ("refused", "Refused", "reason"),
        ("wrong", "Wrong", "what happens"),
        ("not built", "Not tried", "why no small model was built"),
    ):
        rows = [f"| {family} | {verdict.said} |" for family, verdict in verdicts.items() if verdict.kind == kind]
        if rows:
            lines += [f"## {title}\n", f"| family | {column} |", "|---|---|", *rows, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
