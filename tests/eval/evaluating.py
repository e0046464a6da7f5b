"""What the tests of evaluations have in common: a task that needs no time, contenders, and records of prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import chatty
from headwise.eval.contenders import make_contenders
from headwise.eval.run_folder import UNITS
from headwise.eval.task import Item, Measured, Task

# In place of the manual, which is long: tokenising it takes longer than all the rest.
MANUAL = " ".join(f"{number} times: {chatty.TEXT}" for number in range(20))

CONTENDERS = make_contenders(["window:size=4", "window:size=2"], seed=3)

LABELS = [contender.label for contender in CONTENDERS]

KEPT = {"full": 1.0, "Window(size=4)": 0.5, "Window(size=2)": 0.25}

GSM8K_RECORD = {"question": "Two and 3,000?", "answer": "2+3000=<<2+3000=3002>>3,002.\n#### 3,002"}

HUMAN_EVAL_RECORD = {
    "task_id": "Test/0",
    "prompt": 'import math\n\n\ndef half(n):\n    """Half of n."""\n',
    "canonical_solution": "    return n / 2\n",
    "test": "def check(candidate):\n    assert candidate(6) == 3\n",
    "entry_point": "half",
}

ALPACA_RECORD = {"instruction": "Name a colour.", "output": "Blue is one.", "generator": "someone", "dataset": "x"}


@dataclass(frozen=True)
class Toy(Task):
    """Keeps a log of what is asked of it; the metric is the item's number times what is kept."""

    values: tuple[int, ...] = (1, 2, 4)
    extra: str = ""

    name: ClassVar[str] = "toy"
    primary: ClassVar[str] = "score"
    higher_is_better: ClassVar[bool] = True
    log: ClassVar[list] = []
    stop_at: ClassVar[int | None] = None

    def items(self, tokenizer):
        return [Item(str(index), {"value": value}) for index, value in enumerate(self.values)]

    def reference(self, subject, item):
        self.log.append(("reference", item.key))
        return item.data["value"]

    def measure(self, subject, item, kind, reference):
        policy = kind.policy
        if len(self.log) == self.stop_at:
            raise KeyboardInterrupt
        self.log.append((str(policy), item.key))
        kept = KEPT["full"] if str(policy) == "Full()" else KEPT.get(str(policy)) or policy.keep
        metrics = {"score": reference * kept + (0.5 if "Window" in str(policy) else 0)}
        return Measured(metrics, kept, int(100 * kept), 100, 2.0, 1.0, {"said": item.key})


class Indifferent(Toy):
    """Takes any kind of cache with a policy."""

    def measure(self, subject, item, kind, reference):
        self.log.append((str(kind.policy), item.key))
        return Measured({"score": 1.0}, 1.0, 100, 100, 2.0, 1.0)


def lines(path):
    return [json.loads(line) for line in (path / UNITS).read_text().splitlines()]
