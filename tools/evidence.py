"""Evidence: the records of docs/results -> what each policy cost there, for `headwise fit`, in the package.

    python tools/evidence.py

Writes src/headwise/measure/evidence.json. A test holds it against the records.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "src/headwise/measure/evidence.json"

# Files of records, how a policy is called there, how it is for any model, and what of a full cache of 16-bit rows it
# holds: Auto with gates where there are some, and its rows after the prompt kept.
_AUTO = ("auto-match-wikitext", "auto-match-code")
_ROWS = [
    *[
        (_AUTO, f"auto:ratio={r},gate=true,of=prompt+match", f"auto:ratio={r}+match", r)
        for r in (0.25, 0.125, 0.0625, 0.03125)
    ],
    *[(("fidelity-baselines",), f"snapkv:keep={k}", f"snapkv:keep={k}", k) for k in (0.5, 0.25, 0.1)],
]


def collect() -> list[dict[str, Any]]:
    """Policy, share of the bytes, and KL to the full cache, mean of all passages."""
    found = []
    for files, recorded, policy, share in _ROWS:
        rows = [_row(name, recorded) for name in files]
        items = sum(row["items"] for row in rows)
        kl = sum(row["items"] * row["metrics"]["kl"]["mean"] for row in rows) / items
        records = [f"docs/results/{name}.json" for name in files]
        found.append({"policy": policy, "share": share, "kl": round(kl, 6), "passages": items, "records": records})
    return found


def _row(name: str, policy: str) -> dict[str, Any]:
    record = json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = [
        row for each in record["summaries"] for row in each["rows"] if row["policy"] == policy
    ]
    (row,) = rows
    return row


def main() -> int:
    """Write the file."""
    TARGET.write_text(json.dumps(collect(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{TARGET.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
